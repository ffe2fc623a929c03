"""The cached path gives the same numbers as the training forward, and prompts of one batch do not touch each other."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from data.packing import pack
from data.types import Segment
from modeling.bagel.decode import Decoder, DrawOptions, guide
from tests.unit.modeling.tiny import (
    SPEC,
    SPECIAL,
    editing_sample,
    made_up_latents,
    perception_sample,
    picture,
    text,
    tiny_decoder,
)


@pytest.mark.parametrize("head_reads", ["self", "previous"])
def test_cached_text_and_perception_equal_the_training_forward(head_reads: str) -> None:
    d = tiny_decoder(head_reads)
    sample = perception_sample()
    batch = pack([sample], SPEC, SPECIAL)
    with torch.no_grad():
        trained = d.model(batch, made_up_latents(batch).noised)

    context = d.start(1)
    for segment in sample.segments[:2]:
        d.prefill(context, [segment])
    answer = iter([*sample.segments[2].ids.tolist(), SPECIAL.end])
    seen = []

    def teacher(logits: torch.Tensor, sequences: Sequence[int]) -> torch.Tensor:
        seen.append(logits[0])
        return torch.tensor([next(answer, SPECIAL.end)])

    written = d.write(context, 10, choose=teacher)
    torch.testing.assert_close(torch.stack(seen)[:-1], trained.logits, rtol=1e-4, atol=1e-4)
    assert written[0].ids == sample.segments[2].ids.tolist()
    found = dict(d.perceive(context, written)[0])
    torch.testing.assert_close(found["box"].boxes, trained.heads["box"].boxes, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        found["mask"].mask_logits, trained.heads["mask"].mask_logits, rtol=1e-4, atol=1e-4
    )


def test_cached_velocity_equals_the_training_forward() -> None:
    d = tiny_decoder()
    sample = editing_sample()
    batch = pack([sample], SPEC, SPECIAL)
    flow = made_up_latents(batch)
    with torch.no_grad():
        trained = d.model(batch, flow.noised).velocity[batch.gen_timestep > 0]
    context = d.start(1)
    for segment in sample.segments[:3]:
        d.prefill(context, [segment])
    blank = d.blank_images(context, [(32, 64)])
    before = list(context.cache.lens)
    v = d.velocity(context, blank, flow.noised[batch.gen_timestep > 0], 0.7)
    torch.testing.assert_close(v, trained, rtol=1e-4, atol=1e-4)
    assert context.cache.lens == before


def test_prompts_of_a_batch_give_what_each_gives_alone() -> None:
    d = tiny_decoder()
    prompts = [
        [Segment(kind="und_image", pixels=picture(1)), text(10, 11)],
        [Segment(kind="und_image", pixels=picture(2, 32, 64)), text(12, 13, 14, 15)],
        [Segment(kind="und_image", pixels=picture(3, 16, 16)), text(9)],
    ]

    def run(*seeds: int) -> tuple[list[list[int]], list[torch.Tensor]]:
        group = [prompts[s] for s in seeds]
        context = d.start(len(group))
        for i in range(2):
            d.prefill(context, [p[i] for p in group])
        ids = [w.ids for w in d.write(context, 6)]
        sizes = [(32, 32 + 16 * s) for s in seeds]
        return ids, d.draw(
            context, sizes, seeds, DrawOptions(num_timesteps=4, cfg_text_scale=3.0), d.start(len(group))
        )

    together = run(0, 1, 2)
    for i in range(3):
        alone = run(i)
        assert together[0][i] == alone[0][0]
        assert (together[1][i].int() - alone[1][0].int()).abs().max() <= 1


def test_a_text_stops_at_its_limit_and_says_so() -> None:
    d = tiny_decoder()
    written = d.write(d.start(2), 3, choose=lambda logits, sequences: torch.full((len(logits),), 7))
    assert [w.ids for w in written] == [[7, 7, 7]] * 2
    assert not any(w.finished for w in written)


def test_mixed_kinds_in_one_round_are_refused() -> None:
    d = tiny_decoder()
    with pytest.raises(ValueError, match="same order"):
        d.prefill(d.start(2), [text(1), Segment(kind="und_image", pixels=picture(1))])


@pytest.mark.parametrize("kind", ["global", "channel", "text_channel"])
def test_guidance_never_grows_the_velocity(kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    v = [torch.randn(6, 4, generator=generator) for _ in range(3)]
    owner = torch.tensor([0, 0, 1, 1, 1, 1])
    options = DrawOptions(cfg_text_scale=4.0, cfg_img_scale=2.0, cfg_renorm_type=kind)  # type: ignore[arg-type]
    out = guide(v[:2], owner, options)
    if kind == "global":
        for i in range(2):
            assert out[owner == i].norm() <= v[0][owner == i].norm() * (1 + 1e-5)
    else:
        assert (out.norm(dim=1) <= v[0].norm(dim=1) * (1 + 1e-5)).all()
    plain = replace(options, cfg_renorm_min=1.0)
    torch.testing.assert_close(guide(v[:2], owner, plain), v[1] + 4.0 * (v[0] - v[1]))
    torch.testing.assert_close(guide(v, owner, plain), v[2] + 2.0 * (v[1] + 4.0 * (v[0] - v[1]) - v[2]))


def test_a_model_in_bf16_reads_and_draws() -> None:
    def draw(d: Decoder) -> tuple[torch.Tensor, torch.dtype]:
        context = d.start(1)
        for segment in (Segment(kind="und_image", pixels=picture(1)), text(10, 11)):
            d.prefill(context, [segment])
        d.write(context, 2)
        (image,) = d.draw(context, [(32, 32)], [5], DrawOptions(num_timesteps=4), d.start(1))
        assert context.cache.layers[0] is not None
        return image.float(), context.cache.layers[0][0].dtype

    exact, rounded = tiny_decoder(), tiny_decoder()
    rounded.model.bfloat16()
    (first, full), (second, half) = draw(exact), draw(rounded)
    assert (full, half) == (torch.float32, torch.bfloat16)
    assert 0 < (first - second).abs().mean() < 1  # levels of 255; measured: 0.19
