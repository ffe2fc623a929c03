"""Pictures that pass the VAE -> latent patches on their path between data and noise."""

from collections import OrderedDict

import torch
from torch import Tensor

from data.types import PackedBatch
from modeling.autoencoder import AutoEncoder
from modeling.ops.flow import interpolate_path, seeded_noise
from modeling.ops.patch import normalise_pixels, patchify_latent
from modeling.types import FlowState

POSTERIOR_SALT = 0x5EED
"""Keeps the posterior sample of an image independent of its flow noise, which has the same seed."""


class LatentEncoder:
    """Encodes a pack's images with the frozen VAE; moments of images seen before come from a cache.

    Every image is encoded at its own size, never padded to its pack mates (their padding would leak into it through
    GroupNorm and attention). Images of one size go through together, which gives the same numbers.

    Args:
        vae: the frozen autoencoder.
        latent_patch_size: latent cells per side that make one token.
        cache_mb: memory for moments of images seen before, oldest out first; 0 turns the cache off.
    """

    def __init__(self, vae: AutoEncoder, latent_patch_size: int, cache_mb: float = 0):
        # Faster on a CPU (benchmarks/cpu_step.py), and what GPU convolutions want in low precision.
        self.vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.patch = latent_patch_size
        self._room, self._used = int(cache_mb * 2**20), 0
        self._cache: OrderedDict[int, Tensor] = OrderedDict()

    @torch.no_grad()
    def __call__(self, batch: PackedBatch) -> FlowState:
        """Latents, noise and noised latents of a pack, each `l (p p z)` float32."""
        device = batch.gen_timestep.device
        width = self.vae.config.z_channels * self.patch**2
        moments = self._moments(batch)
        latents, noise = [torch.zeros(0, width, device=device)], [torch.zeros(0, width, device=device)]
        for seed, (mean, logvar) in zip(batch.gen_seed.tolist(), moments, strict=True):
            sample = mean + (0.5 * logvar).exp() * seeded_noise(
                seed ^ POSTERIOR_SALT, tuple(mean.shape), device
            )
            latents.append(patchify_latent(self.vae.scaled(sample), self.patch))
            noise.append(seeded_noise(seed, tuple(latents[-1].shape), device))
        z, e = torch.cat(latents), torch.cat(noise)
        return FlowState(latents=z, noise=e, noised=interpolate_path(z, e, batch.gen_timestep))

    def missing(self, batch: PackedBatch) -> dict[int, Tensor]:
        """The pictures of a pack that have to be encoded: pixels by key."""
        keys = batch.gen_key.tolist()
        return {key: p for key, p in zip(keys, batch.gen_pixels, strict=True) if key not in self._cache}

    def _moments(self, batch: PackedBatch) -> list[Tensor]:
        """Mean and log variance `2 z h w` of every image, in order."""
        keys = batch.gen_key.tolist()
        found = {key: self._cache[key] for key in keys if key in self._cache}
        missing = self.missing(batch)
        by_size: dict[tuple[int, ...], list[int]] = {}
        for key, pixels in missing.items():
            by_size.setdefault(tuple(pixels.shape), []).append(key)
        for same in by_size.values():
            mean, logvar = self.vae.encode_moments(normalise_pixels(torch.stack([missing[k] for k in same])))
            found.update(zip(same, (m.clone() for m in torch.stack([mean, logvar], dim=1)), strict=True))
        for key in keys:
            self._remember(key, found[key])
        return [found[key] for key in keys]

    def _remember(self, key: int, moments: Tensor) -> None:
        if key in self._cache:
            self._cache.move_to_end(key)
            return
        self._cache[key] = moments
        self._used += moments.numel() * moments.element_size()
        while self._used > self._room:
            _, oldest = self._cache.popitem(last=False)
            self._used -= oldest.numel() * oldest.element_size()
