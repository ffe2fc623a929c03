"""Losses on pictures: the clean latent that a velocity stands for, decoded, beside the target picture.

The nearer to noise, the less a picture can be told from its latent: a target counts with weight 1 - t / max_t, and above max_t
not at all. Gradients go through the frozen VAE's decoder, a few pictures at a time: each chunk's gradient is computed with its
value, so memory holds the activations of one chunk. Source of the formulas: the published pixel loss (MedQ-Uni ddf03d5).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from data.types import PackedBatch
from modeling.ops.patch import patchify_latent, unpatchify_latent
from modeling.ops.ready_gradient import ready_gradient
from modeling.ops.ssim import ssim
from modeling.types import FlowState, LossValues, ModelOutput, Things

Decode = Callable[[Tensor], Tensor]
"""Scaled latents `i z h w` -> pictures `i 3 hh ww`, about in [-1, 1]."""
Compare = Callable[[Tensor, Tensor], Tensor]
"""Predicted and true pictures `i 3 hh ww` in [0, 1] -> mean error of each, `i`."""
Chunk = Literal["adaptive", "all"] | int


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureLoss:
    """A loss on decoded pictures.

    Attributes:
        decode: with parameters that are frozen.
        patch: latent cells per side of a token.
        compare: one picture beside another.
        by_pixel: a picture counts by its numbers (pixels x 3); else every picture counts the same.
        max_t: largest timestep at which a picture counts.
        paired_only: targets of samples with an input picture only (editing, restoration).
        chunk: pictures decoded at a time; `adaptive`: 1 from a megapixel on, 2 from a quarter, else 4; `all`.
        gradient_scale: factor of the gradient that is not in the value.
    """

    decode: Decode
    patch: int
    compare: Compare
    by_pixel: bool
    max_t: float
    paired_only: bool
    chunk: Chunk = "adaptive"
    gradient_scale: float = 1.0

    def things(self, batch: PackedBatch) -> Things:
        """Target pictures near enough to clean, each with its weight."""
        targets = self._targets(batch)
        first = torch.tensor(
            [t.rows.start for t in targets], dtype=torch.int64, device=batch.gen_index.device
        )
        amount = torch.tensor([t.amount for t in targets], dtype=torch.float32, device=batch.gen_index.device)
        return Things(place=batch.gen_index[first], amount=amount)

    def values(self, output: ModelOutput, batch: PackedBatch, flow: FlowState) -> LossValues:
        """Sum over these pictures of their weighted errors."""
        velocity, targets = output.velocity, self._targets(batch)
        wants = torch.is_grad_enabled() and velocity.requires_grad
        gradient = torch.zeros_like(velocity)
        each = velocity.new_zeros(len(targets))
        for chunk in self._chunks(batch, targets):
            of_chunk = [targets[i] for i in chunk]
            clean = torch.stack([self._clean(t, velocity.detach(), flow) for t in of_chunk])
            truth = torch.stack([batch.gen_pixels[t.image] for t in of_chunk]).to(clean.dtype) / 255
            amount = clean.new_tensor([t.amount for t in of_chunk])
            with torch.set_grad_enabled(wants):
                errors = amount * self.compare(self.decode(clean.requires_grad_(wants)) / 2 + 0.5, truth)
            each[chunk] = errors.detach().to(each.dtype)
            if wants:
                (by_latent,) = torch.autograd.grad(errors.sum(), clean)
                for t, x in zip(of_chunk, by_latent, strict=True):
                    # The clean latent falls with t as the velocity grows.
                    gradient[t.rows] = -t.time * self.gradient_scale * patchify_latent(x, self.patch)
        total = each.sum()
        return LossValues(
            total=total + ready_gradient(velocity, gradient, keep=True) if wants else total, each=each
        )

    def _targets(self, batch: PackedBatch) -> list["_Target"]:
        sizes = batch.gen_hw.tolist()
        starts = list(itertools.accumulate((h * w for h, w in sizes), initial=0))
        times = batch.gen_timestep[torch.tensor(starts[:-1], dtype=torch.int64)].tolist()
        paired = _have_input(batch, starts[:-1]) if self.paired_only else [True] * len(sizes)
        found = []
        for image, ((h, w), start, t) in enumerate(zip(sizes, starts[:-1], times, strict=True)):
            if 0 < t < self.max_t and paired[image]:
                weight = 1 - t / self.max_t
                numbers = batch.gen_pixels[image].numel() if self.by_pixel else 1
                found.append(_Target(image, slice(start, start + h * w), (h, w), t, weight * numbers))
        return found

    def _clean(self, target: "_Target", velocity: Tensor, flow: FlowState) -> Tensor:
        """The latent `z h w` that the velocity leads to."""
        rows, (h, w) = target.rows, target.hw
        return unpatchify_latent(flow.noised[rows] - target.time * velocity[rows], h, w, self.patch)

    def _chunks(self, batch: PackedBatch, targets: Sequence["_Target"]) -> Iterator[list[int]]:
        """Places in `targets` of pictures that go through the decoder together: of one size."""
        by_size: dict[tuple[int, ...], list[int]] = {}
        for place, t in enumerate(targets):
            by_size.setdefault(tuple(batch.gen_pixels[t.image].shape), []).append(place)
        for (_, height, width), places in by_size.items():
            size = chunk_size(self.chunk, height * width, len(places))
            yield from (places[i : i + size] for i in range(0, len(places), size))


class _Target(NamedTuple):
    image: int
    rows: slice
    hw: tuple[int, int]
    time: float
    amount: float


def chunk_size(chunk: Chunk, pixels: int, count: int) -> int:
    """How many of `count` pictures of so many pixels are decoded at a time."""
    if chunk == "all":
        return count
    if chunk == "adaptive":
        return 1 if pixels >= 2**20 else 2 if pixels >= 2**18 else 4
    return chunk


def _have_input(batch: PackedBatch, first_rows: Sequence[int]) -> list[bool]:
    """Of every VAE image: whether its sample has an input picture, for the ViT or for the VAE."""
    ends = torch.tensor(batch.sample_lens, dtype=torch.int64, device=batch.gen_index.device).cumsum(0)
    inputs = torch.cat([batch.und_index, batch.gen_index[batch.gen_timestep == 0]])
    have = set(torch.searchsorted(ends, inputs, right=True).unique().tolist())
    places = batch.gen_index[torch.tensor(first_rows, dtype=torch.int64, device=ends.device)]
    return [s in have for s in torch.searchsorted(ends, places, right=True).tolist()]


def mean_absolute(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute error of each picture, `i`."""
    return (a - b).abs().flatten(1).mean(1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each picture, `i`."""
    return (a - b).square().flatten(1).mean(1)


def dissimilarity(window: int) -> Compare:
    """1 - structural similarity of each picture, `i`."""
    return lambda a, b: 1 - ssim(a, b, window)
