"""The cache against the training forward, on samples of every kind."""

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from data.sources import Record
from data.tokens import SPECIAL_TOKENS, Tokenizer
from data.transforms.image import ImageTransform
from data.types import Sample
from data.vlm_dataset import VlmDataset
from inference_pipeline.check_cache import comparable, differences
from modeling.bagel.decode import Decoder
from tests.unit.modeling.tiny import every_sample, picture, tiny_decoder


def png(seed: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(seed, 32, 32).permute(1, 2, 0).numpy()).save(file, "PNG")
    return file.getvalue()


FRAMES = {f"{n}.png": png(n) for n in range(5)}


def about_a_video(tokenizer: Tokenizer) -> Sample:
    """A row of `vlm_sft` whose video is five frames, three of which are shown."""
    row = {
        "video": list(FRAMES),
        "message": [{"from": "human", "value": "<video>\nWhat moves?"}, {"from": "gpt", "value": "A 7."}],
    }
    sizes = {"max_num_frames": 3, "min_num_frames": 3}
    dataset = VlmDataset(
        tokenizer=tokenizer,
        vit_transform=ImageTransform(max_image_size=32, min_image_size=16, stride=8),
        frame_sampler_args=sizes,
    )
    record = Record(data=row, where="rows.jsonl:1", fetch=FRAMES.__getitem__)
    return dataset.to_sample(record, np.random.default_rng(0))


@pytest.fixture(scope="module")
def made(save_tokenizer) -> tuple[Decoder, Tokenizer]:  # type: ignore[no-untyped-def]
    tokenizer: Tokenizer = save_tokenizer(SPECIAL_TOKENS)
    plain = tiny_decoder(vocab_size=len(tokenizer))
    return Decoder(plain.model, plain.encoder, plain.spec, tokenizer.special), tokenizer


def test_frames_of_a_video_are_pictures_like_others(made: tuple[Decoder, Tokenizer]) -> None:
    decoder, tokenizer = made
    sample = about_a_video(tokenizer)
    assert [s.kind for s in sample.segments] == ["und_image"] * 3 + ["text", "text"]
    assert comparable([sample]) == ([sample], 0)
    found = list(differences(decoder, [sample]))
    assert [name for name, _, _ in found] == ["logits"]
    assert max(difference for _, difference, _ in found) < 1e-4


def test_frames_that_see_each_other_are_left_out_and_counted(made: tuple[Decoder, Tokenizer]) -> None:
    decoder, tokenizer = made
    one_by_one = about_a_video(tokenizer)
    first, *rest = one_by_one.segments
    together = replace(
        one_by_one, segments=(first, *(replace(s, same_split=s.kind == "und_image") for s in rest))
    )
    assert comparable([one_by_one, together, one_by_one]) == ([one_by_one, one_by_one], 1)
    # They would differ indeed: were they compared, the cache would be blamed.
    with torch.no_grad():
        assert max(difference for _, difference, _ in differences(decoder, [together])) > 1e-4


def test_every_kind_of_prediction_is_compared() -> None:
    decoder = tiny_decoder()
    found = list(differences(decoder, every_sample()))
    assert {name for name, _, _ in found} == {"logits", "velocity", "box", "mask"}
    assert max(difference for _, difference, _ in found) < 1e-4
