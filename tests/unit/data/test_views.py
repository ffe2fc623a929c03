"""What an image encoder inside a head is shown: SAM's resize, and the way from the YAML into a pack."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from data.conversation import image_segment
from data.packing import pack
from data.transforms import LongestSide, build_transform
from data.transforms.image import ImageTransform
from data.types import Sample
from modeling.sam.encoder import padded
from tests.unit.modeling.tiny import SPEC, SPECIAL, text

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding"
CASES = json.loads((GOLDEN / "sam_pre_post.json").read_text())
TENSORS = load_file(GOLDEN / "sam_pre_post.safetensors")


def test_sizes() -> None:
    for case in CASES["resize_longest_side"]:
        (height, width), out = case["hw"], [max(1, side) for side in case["out"]]  # ours leaves a pixel
        assert [*LongestSide(case["target"]).resized(width, height)][::-1] == out, case


@pytest.mark.parametrize("case", CASES["images"], ids=lambda c: c["id"])
def test_pixels(case: dict) -> None:
    picture = Image.fromarray(TENSORS[f"{case['id']}.input_uint8"].numpy())
    seen = build_transform({"type": "sam", "image_size": case["target"]})(picture)
    want = TENSORS[f"{case['id']}.resized_uint8"].permute(2, 0, 1)
    assert int((seen.int() - want.int()).abs().max()) <= 1
    square = padded([want], case["target"], torch.device("cpu"))[0]
    torch.testing.assert_close(square, TENSORS[f"{case['id']}.normalised_padded"], rtol=0, atol=1e-5)


def test_a_view_goes_with_its_picture() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    transform = ImageTransform(max_image_size=64, min_image_size=16, stride=8)
    plain = image_segment("und_image", picture, transform)
    seen = image_segment("und_image", picture, transform, view=LongestSide(48))
    assert plain.view.numel() == 0 and seen.view.shape == (3, 32, 48)
    sample = Sample(segments=(plain, seen, text(9, supervised=True)))
    batch = pack([sample, sample], SPEC, SPECIAL)
    assert [tuple(v.shape) for v in batch.und_views] == [(3, 0, 0), (3, 32, 48)] * 2
    assert torch.equal(batch.und_views[3], seen.view)
    with pytest.raises(ValueError, match="image_size must be a positive whole number"):
        replace(LongestSide(4), image_size=0)
