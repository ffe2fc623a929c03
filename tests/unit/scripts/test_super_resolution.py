"""The super-resolution recipe's data: what is known of a photograph, what is held out, and that the trainer can read it."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.mixture import build_groups, load_mixture
from data.tokens import Tokenizer
from scripts.super_resolution.make_data import SCALE, SIDE, degrade, grid_of_crops, main, random_crops, split

CONFIG = Path(__file__).parents[3] / "configs" / "super_resolution.yaml"


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_training_and_test_share_no_column_of_a_photograph() -> None:
    numbered = np.broadcast_to(np.arange(250, dtype=np.uint8)[None, :, None], (66, 250, 3))
    left, right = split(numbered)
    assert left.shape == (64, 184, 3) and right.shape[0] == 64 and right.shape[1] % SCALE == 0
    assert left.max() < right.min()


@pytest.mark.parametrize("blur", [0.0, 2.0])
def test_what_is_known_comes_from_a_sixteenth_of_the_pixels(blur: float) -> None:
    flat = np.full((64, 32, 3), 77, np.uint8)
    assert np.array_equal(degrade(flat, blur), flat)
    pixels = noise(64, 64)
    low = degrade(pixels, blur)
    assert low.shape == pixels.shape and low.std() < pixels.std()
    if not blur:  # a pixel that is in no block's middle is not looked at
        changed = pixels.copy()
        changed[::SCALE] = 0
        assert np.array_equal(degrade(changed, blur), low)


def test_crops_of_both_pictures_are_of_one_place() -> None:
    pixels = noise(96, 96)
    pairs = [(pixels, pixels)]
    for crops in (random_crops(pairs, 5, np.random.default_rng(0)), grid_of_crops(pairs)):
        found = list(crops)
        assert all(low.shape == (SIDE, SIDE, 3) and np.array_equal(low, high) for low, high in found)
    assert len(found) == 9 and len({high.tobytes() for _, high in found}) == 9
    pixels[:SIDE] = 200  # nothing to see in the first row of crops
    assert len(list(grid_of_crops(pairs))) == 6


def test_the_mixture_reads_what_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("skimage")
    main(["--output_dir", str(tmp_path), "--crops", "7"])
    monkeypatch.setenv("WEFT_SR", str(tmp_path))
    (group,) = build_groups(load_mixture(CONFIG), Tokenizer(tmp_path / "base"))
    assert len(group.source) == 7
    sample = group.dataset.to_sample(group.source.read(0), np.random.default_rng(0))
    kinds = [s.kind for s in sample.segments]
    assert kinds[:2] == ["cond_image", "und_image"] and "gen_image" in kinds
    cond, und = sample.segments[:2]
    assert cond.pixels.shape == (3, SIDE, SIDE) and und.pixels.shape == (3, SIDE // SCALE, SIDE // SCALE)
    rows = [json.loads(line) for line in (tmp_path / "data" / "test.jsonl").read_text().splitlines()]
    assert len(rows) > 100
    with Image.open(tmp_path / "data" / rows[0]["output_img"][0]["path"]) as high:
        assert high.size == (SIDE, SIDE)
