"""The resize rule as a table, and whole pictures of several modes."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from data.rgb_image import to_rgb
from data.transforms.image import MAX_PIXELS, ImageTransform
from modeling.ops.patch import normalise_pixels
from tests.parity.comparison import Comparison

TOLERANCE = 1e-6


def run(folder: Path) -> Comparison:
    """Every size of the table, exactly; every picture's pixels."""
    found = Comparison()
    table = json.loads((folder / "resize_table.json").read_text())
    for entry in table["parameter_sets"]:
        transform, images = _transform(entry["parameters"]), entry["parameters"].get("img_num", 1)
        ours = [list(transform.resized(*pair, images)) for pair in table["pairs"]]
        found.equal(f"resize_table/{entry['parameters']['name']}", ours, entry["resized"])

    pictures = json.loads((folder / "pixels.json").read_text())
    tensors = load_file(folder / "pixels.safetensors")
    for picture in pictures["images"]:
        with Image.open(folder / picture["file"]) as opened:
            opened.load()
        found.equal(
            f"{picture['name']}/opened",
            [opened.mode, *opened.size],
            [picture["mode"], picture["width"], picture["height"]],
        )
        rgb = _channels_last(to_rgb(opened))
        found.equal(f"{picture['name']}/rgb", rgb, tensors[f"{picture['name']}/rgb_uint8_hwc"])
        for i, parameters in enumerate(pictures["parameter_sets"]):
            ours = normalise_pixels(_transform(parameters)(opened))
            name, theirs = f"{picture['name']}/set{i}", picture["results"][i]
            found.close(name, ours, tensors[f"{name}/pixels_chw"], TOLERANCE)
            found.equal(f"{name}/size", [ours.shape[2], ours.shape[1]], theirs["size_wh"])
            exact = ours.double()
            statistics = {
                "mean": exact.mean(),
                "mean_per_channel": exact.mean((1, 2)),
                "std_per_channel": exact.std((1, 2), correction=0),
            }
            for what, value in statistics.items():
                found.close(f"{name}/{what}", value, torch.tensor(theirs[what]), TOLERANCE)
    return found


def _transform(parameters: Mapping[str, Any]) -> ImageTransform:
    return ImageTransform(
        max_image_size=parameters["max_image_size"],
        min_image_size=parameters["min_image_size"],
        stride=parameters["image_stride"],
        max_pixels=parameters["max_pixels"] or MAX_PIXELS,
    )


def _channels_last(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(
        image.height, image.width, 3
    )
