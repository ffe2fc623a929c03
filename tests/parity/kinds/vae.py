"""The FLUX-style autoencoder alone."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parity.comparison import Comparison
from tests.parity.kinds.models import build_autoencoder

TOLERANCE, PIXEL_TOLERANCE = 1e-5, 2e-5


def run(folder: Path) -> Comparison:
    """Moments, latents from the mean and from a sample, decoded pictures; loaded as any `ae.safetensors`."""
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    config = json.loads((folder / "config.json").read_text())
    model = build_autoencoder(config, load_file(folder / "weights.safetensors"))
    found = Comparison()
    with torch.no_grad():
        for key, image in inputs.items():
            kind, _, i = key.partition(".")
            if kind == "latent":
                found.close(f"decoded.{i}", model.decode(image), expected[f"decoded.{i}"], PIXEL_TOLERANCE)
            if kind != "image":
                continue
            moments = torch.cat(model.encode_moments(image), dim=1)
            latents, sampled = model.encode(image), model.encode(image, inputs[f"encode_noise.{i}"])
            again = model.decode(latents)
            found.close(f"encoder_moments.{i}", moments, expected[f"encoder_moments.{i}"], TOLERANCE)
            found.close(f"latent_from_mean.{i}", latents, expected[f"latent_from_mean.{i}"], TOLERANCE)
            found.close(f"latent_sampled.{i}", sampled, expected[f"latent_sampled.{i}"], TOLERANCE)
            theirs = expected[f"reconstruction_from_mean.{i}"]
            found.close(f"reconstruction_from_mean.{i}", again, theirs, PIXEL_TOLERANCE)
    return found
