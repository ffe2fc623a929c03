"""Rectified flow on VAE latents. Time 0 is data, time 1 is noise."""

import torch
from torch import Tensor


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """Velocity of the straight path from data to noise, the same for every time.

    Args:
        clean: `l d`, VAE latents after scaling (about unit variance).
        noise: `l d`, standard normal.

    Returns:
        `l d`, dx/dt.

    Raises:
        ValueError: if the two shapes differ.

    Source: rectified flow, arXiv 2209.03003; sign as upstream Bagel 056b5fd.
    """
    if clean.shape != noise.shape:
        raise ValueError(f"latents are {tuple(clean.shape)}, noise is {tuple(noise.shape)}")
    return noise - clean


def interpolate_path(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Point of the straight path, `l d`, at times `t` `l`: `clean` at 0, `noise` at 1."""
    return (1 - t[:, None]) * clean + t[:, None] * noise


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise by the schedule's shift (1 leaves them): s t / (1 + (s - 1) t)."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(num_timesteps: int, shift: float) -> Tensor:
    """`num_timesteps` times from 1 down to 0 after the shift; there is one step fewer than times."""
    return shift_time(torch.linspace(1, 0, num_timesteps), shift)


def seeded_noise(seed: int, shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal noise that depends on the seed only (and the device kind)."""
    generator = torch.Generator(device=device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device)
