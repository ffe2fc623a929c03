"""Prompts of every shape through the inferencer: alone and in a batch, thinking, drawing, and the published way of reading."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.tokens import SPECIAL_TOKENS, Tokenizer
from data.transforms.image import ImageTransform
from inference_pipeline import inferencer
from inference_pipeline.inferencer import (
    AS_PUBLISHED,
    THINK_BEFORE_ANSWERING,
    THINK_BEFORE_DRAWING,
    Answer,
    Inferencer,
    Prompt,
    Reading,
)
from modeling.bagel.decode import PUBLISHED_RECIPES, Context, Decoder, DrawOptions
from tests.unit.modeling.tiny import picture, tiny_decoder

VIT = ImageTransform(max_image_size=64, min_image_size=16, stride=8)
VAE = ImageTransform(max_image_size=64, min_image_size=16, stride=16)


class Spy(Decoder):
    """Remembers what was read last, and the lengths of a drawing's contexts: the full, the text-free, the picture-free one."""

    def __init__(self, *parts) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*parts)
        self.noise_seeds: list[int] = []

    def prefill(self, context, segments):  # type: ignore[no-untyped-def]
        self.last_read = segments
        self.noise_seeds += [s.noise_seed for s in segments if s.kind == "cond_image"]
        return super().prefill(context, segments)

    def draw(self, context, sizes, seeds, options, without_text=None, without_images=None):  # type: ignore[no-untyped-def]
        self.sizes, self.options = sizes, options
        self.lens = [_lens(c) for c in (context, without_text, without_images)]
        return super().draw(context, sizes, seeds, options, without_text, without_images)


def _lens(context: Context | None) -> list[int] | None:
    return None if context is None else list(context.cache.lens)


def image(seed: int, height: int = 40, width: int = 56) -> Image.Image:
    return Image.fromarray(picture(seed, height, width).permute(1, 2, 0).numpy())


@pytest.fixture(scope="module")
def make(save_tokenizer):
    """Builds an inferencer on the tiny model; the tokenizer has one token per byte."""
    tokenizer: Tokenizer = save_tokenizer(SPECIAL_TOKENS)
    plain = tiny_decoder(vocab_size=len(tokenizer))
    decoder = Spy(plain.model, plain.encoder, plain.spec, tokenizer.special)

    def build(reading: Reading = Reading(), vit: ImageTransform = VIT) -> Inferencer:  # noqa: B008 - frozen
        return Inferencer(decoder, tokenizer, vit, VAE, reading)

    return build


PROMPTS = (
    Prompt(text="What is this?", images=(image(1),)),
    Prompt(text="a red 7"),
    Prompt(parts=(image(2, 64, 32), "and", image(3, 20, 20), "which is larger, of the two?")),
    Prompt(parts=("first a text", image(4, 33, 60)), think=True),
    Prompt(text="<image>here <image>and there", images=(image(5, 50, 50), image(6)), think="Think about it."),
)


def same(ours: Answer, alone: Answer) -> bool:
    return (ours.text, ours.thought, ours.boxes) == (alone.text, alone.thought, alone.boxes)


@pytest.mark.parametrize("do_sample", [False, True])
def test_answers_of_a_batch_are_what_each_gives_alone(make, do_sample: bool) -> None:
    model = make()
    together = model.answer(PROMPTS, 12, do_sample=do_sample, temperature=0.7, seed=3)
    for i, prompt in enumerate(PROMPTS):
        (alone,) = model.answer([prompt], 12, do_sample=do_sample, temperature=0.7, seed=3 + i)
        assert same(together[i], alone)
    assert len({a.text for a in together}) == len(PROMPTS)


def test_draws_depend_on_the_seed(make) -> None:
    def ask(seed: int) -> str:
        return make().answer(PROMPTS[:1], 12, do_sample=True, seed=seed)[0].text

    assert ask(1) == ask(1)
    assert len({ask(seed) for seed in range(4)}) == 4


@pytest.mark.parametrize("taylorseer", [False, True])
@pytest.mark.parametrize("renorm", ["global", "channel", "text_channel"])
def test_pictures_of_a_batch_are_what_each_gives_alone(make, renorm: str, taylorseer: bool) -> None:
    model = make()
    options = DrawOptions(
        num_timesteps=9 if taylorseer else 4,
        cfg_text_scale=3.0,
        cfg_img_scale=1.5,
        cfg_renorm_type=renorm,  # type: ignore[arg-type]
        taylorseer=taylorseer,
    )
    prompts = (*PROMPTS, replace(PROMPTS[0], answer_first=True))
    together = model.generate(prompts, options, seed=3, max_new_tokens=5)
    assert len({g.image.size for g in together}) == 3
    for i, prompt in enumerate(prompts):
        (alone,) = model.generate([prompt], options, seed=3 + i, max_new_tokens=5)
        assert (together[i].text, together[i].thought) == (alone.text, alone.thought)
        off = np.abs(np.asarray(together[i].image).astype(int) - np.asarray(alone.image).astype(int))
        assert off.shape == np.asarray(alone.image).shape and off.max() <= 1
    assert not together[0].text and together[-1].text


def test_the_whole_batchs_norm_is_the_published_one_and_depends_on_neighbours(make) -> None:
    model = make()
    options = DrawOptions(num_timesteps=4, cfg_text_scale=6.0, renorm_whole_batch=True)
    together, alone = model.generate(PROMPTS[:2], options), model.generate(PROMPTS[:1], options)
    assert not np.array_equal(np.asarray(together[0].image), np.asarray(alone[0].image))


def test_parts_and_placeholders_are_two_ways_to_say_the_same(make) -> None:
    model, (a, b) = make(), (image(1), image(2, 64, 32))
    parts = Prompt(parts=("left", a, "right", b, "which?"))
    text = Prompt(text="left<image>right <image> which?", images=(a, b))
    assert same(*model.answer([parts, text], 12))
    # A text is a segment of its own, as in a list of inputs; and a literal placeholder is text.
    model.generate([Prompt(parts=("one", "two")), Prompt(parts=("<image>",))], num_timesteps=2)
    assert model.decoder.lens[0] == [2 * (3 + 2), len("<image>") + 2]
    with pytest.raises(ValueError, match="either parts, or a text"):
        Prompt(parts=("one",), text="two")


def test_a_thought_is_behind_the_full_context_only(make) -> None:
    model = make()
    options = DrawOptions(num_timesteps=2, cfg_text_scale=3.0, cfg_img_scale=1.5)

    def lens(prompt: Prompt) -> list[int]:
        model.generate([prompt], options, max_new_tokens=4)
        return [n[0] for n in model.decoder.lens]

    seen = (image(1),)
    plain = lens(Prompt(text="make it red", images=seen))
    asked = lens(Prompt(text="make it red", images=seen, think="Plan."))
    system = len("Plan.") + 2
    # Begin, at most four tokens, end; the answer may be shorter.
    assert system + 2 <= asked[0] - plain[0] <= system + 6
    assert [n - p for n, p in zip(asked[1:], plain[1:], strict=True)] == [system, system]
    ours = lens(Prompt(text="make it red", images=seen, think=True))
    assert ours[1] - plain[1] == len(THINK_BEFORE_DRAWING) + 2


def test_thoughts_come_back_beside_the_answer(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    for said, thought, text in (
        ("<think> so\nand so </think> 7", "so\nand so", "7"),
        ("<think>cut short", "cut short", ""),
        ("none at all", "", "none at all"),
    ):
        monkeypatch.setattr(model.tokenizer, "decode", lambda ids, keep_special=False, said=said: said)
        (answer,) = model.answer([Prompt(text="how many?", think=True)], 2)
        assert (answer.thought, answer.text) == (thought, text)
        (drawn,) = model.generate([Prompt(text="a 7", think=True)], num_timesteps=2, max_new_tokens=2)
        assert (drawn.thought, drawn.text) == (thought, text)
        (unasked,) = model.answer([Prompt(text="how many?")], 2)
        assert (unasked.thought, unasked.text) == ("", said)
    assert THINK_BEFORE_ANSWERING != THINK_BEFORE_DRAWING


def test_what_is_pointed_at_before_drawing_comes_back(make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make()
    anchors = model.tokenizer.special.anchors
    said = iter([anchors["box"], anchors["mask"], model.tokenizer.special.end])
    monkeypatch.setattr(
        inferencer, "likeliest", lambda logits, rows: torch.tensor([next(said, 0)] * len(logits))
    )
    prompt = Prompt(text="make it red", images=(image(1, 40, 56),), answer_first=True)
    (drawn,) = model.generate([prompt], num_timesteps=2)
    ((x0, y0, x1, y1),) = drawn.boxes
    assert 0 <= x0 < x1 <= 56 and 0 <= y0 < y1 <= 40
    assert [mask.shape for mask in drawn.masks] == [(40, 56)]
    (unasked,) = model.generate([replace(prompt, answer_first=False)], num_timesteps=2)
    assert not unasked.boxes and not unasked.masks


def test_the_context_without_text(make) -> None:
    options = DrawOptions(num_timesteps=2, cfg_text_scale=3.0)
    und, cond, text = 5 * 7 + 2, 2 * 4 + 2, len("make it red") + 2

    def lens(reading: Reading, *parts) -> list[int]:
        model = make(reading)
        model.generate([Prompt(parts=parts)], options)
        assert model.decoder.lens[2] is None  # nothing compares with it
        return [n[0] for n in model.decoder.lens[:2]]

    for reading in (Reading(), Reading(text_free_before=True)):
        assert lens(reading, image(1), "make it red") == [und + cond + text, und + cond]
    assert lens(Reading(), "make it red", image(1)) == [und + cond + text, und + cond]
    assert lens(Reading(text_free_before=True), "make it red", image(1)) == [und + cond + text] * 2


def test_the_tower_sees_pictures_resized_twice_as_published(make) -> None:
    tall = image(1, 44, 40)  # 48 x 40 by the tower's rule, 48 x 32 by the VAE's
    once, twice = VIT(tall), VIT(Image.fromarray(VAE(tall).permute(1, 2, 0).numpy()))
    assert once.shape != twice.shape
    for reading, expected in ((Reading(), once), (AS_PUBLISHED, twice)):
        model = make(reading)
        model.answer([Prompt(images=(tall,))], 1)
        assert torch.equal(model.decoder.last_read[0].pixels, expected)


def test_the_pictures_of_a_question_share_their_area_and_those_of_an_edit_do_not(make) -> None:
    model = make(vit=replace(VIT, max_pixels=64 * 64))
    two, one = (image(1, 64, 64), image(2, 64, 64)), (image(2, 64, 64),)
    for pictures, ask, side in ((two, model.answer, 32), (one, model.answer, 64), (two, model.generate, 64)):
        options = {} if ask == model.answer else {"num_timesteps": 2}
        ask([Prompt(images=pictures)], max_new_tokens=1, **options)
        assert model.decoder.last_read[0].pixels.shape[1:] == (side, side)


def test_the_size_of_a_drawing(make) -> None:
    model = make()
    model.generate(PROMPTS[:3], num_timesteps=2, cfg_text_scale=1.0)
    assert model.decoder.sizes == [(32, 64), (64, 64), (16, 16)]  # the last picture's, or the largest square
    model.generate(PROMPTS[:2], height=32, width=48, num_timesteps=2, cfg_text_scale=1.0)
    assert model.decoder.sizes == [(32, 48)] * 2
    with pytest.raises(ValueError, match="both height and width"):
        model.generate(PROMPTS[:1], height=32)
    with pytest.raises(
        ValueError, match="80x64 px cannot be drawn: the model has positions for 64 px a side"
    ):
        model.generate(PROMPTS[:1], height=64, width=80)
    with pytest.raises(ValueError, match="33x32 px cannot be drawn: both sides must be multiples of 16"):
        model.generate(PROMPTS[:1], height=32, width=33)


def test_recipes_can_be_changed_field_by_field(make) -> None:
    model = make()
    model.generate(PROMPTS[:1], PUBLISHED_RECIPES["edit"], num_timesteps=3)
    assert model.decoder.options == replace(PUBLISHED_RECIPES["edit"], num_timesteps=3)
    assert None not in model.decoder.lens
    with pytest.raises(ValueError, match="cfg_renorm_type must be one of global, channel, text_channel"):
        model.generate(PROMPTS[:1], cfg_renorm_type="local")
    with pytest.raises(TypeError, match="cfg_scale"):
        model.generate(PROMPTS[:1], cfg_scale=3.0)


def test_placeholders_and_pictures_have_to_agree(make) -> None:
    with pytest.raises(ValueError, match="'<image> or <image>' has 2 <image> for 1 pictures"):
        make().answer([Prompt(text="<image> or <image>", images=(image(1),))])


def test_pictures_of_a_prompt_have_noise_of_their_own(make) -> None:
    model = make()
    model.decoder.noise_seeds.clear()
    model.generate([Prompt(parts=(image(1), image(1), "both"))], num_timesteps=2, cfg_text_scale=1.0)
    assert model.decoder.noise_seeds == [0, 1]


def test_a_picture_that_is_none_is_named(make, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.png: cannot be read as a picture"):
        make().answer([Prompt(text="what?", images=(tmp_path / "nothing.png",))])
