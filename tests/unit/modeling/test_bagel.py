"""The whole model on packs: gradients add up over samples, nothing needs a modality to be there."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.types import Origin, Region, Sample, Segment
from modeling.bagel.bagel import Bagel
from modeling.bagel.shard_plan import shard_plan
from modeling.ops.attention_backends import ATTENTION
from tests.unit.modeling.tiny import (
    SPEC,
    SPECIAL,
    drawing_sample,
    editing_sample,
    every_sample,
    made_up_latents,
    perception_sample,
    picture,
    text,
    text_sample,
    tiny_config,
    tiny_model,
)
from train.args import ParamArgs
from train.objective import Objective
from train.param_manager import freeze, group_of

WEIGHTS = {
    "ce": 1.0, "mse": 1.0, "box_l1": 2.0, "box_giou": 0.5, "mask_bce": 1.0, "mask_dice": 1.0,
    "det_objectness": 2.0, "det_l1": 5.0, "det_giou": 2.0, "det_caption": 1.0,
}  # fmt: skip

NO_GRADIENT_IN_EXACT_ARITHMETIC = ("vit_model", "k_proj.bias"), ("heads.box", "key.bias")
"""A bias added to every key, where there are no rotary positions, cancels in the softmax; what is left is rounding."""


def gradients(
    model: Bagel, samples: list[Sample], counts: Tensor | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a pack, divided by `counts` (its own if None)."""
    batch = pack(samples, SPEC, SPECIAL)
    objective = Objective.build(WEIGHTS, model.config.heads)
    flow = made_up_latents(batch)
    model.zero_grad(set_to_none=True)
    loss = objective.scalar(
        objective.terms(model(batch, flow.noised), batch, flow),
        objective.counts(batch) if counts is None else counts,
    )
    loss.backward()
    return loss.item(), {
        n: p.grad for n, p in model.named_parameters() if p.requires_grad and p.grad is not None
    }


def assert_same_gradients(a: dict[str, Tensor], b: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name, x in a.items():
        if any(name.startswith(a) and name.endswith(b) for a, b in NO_GRADIENT_IN_EXACT_ARITHMETIC):
            continue
        error = (x - b[name]).abs().max() / x.abs().max().clamp(min=1e-6)
        assert error < tolerance, f"{name}: relative error {error:.2e}"


@pytest.mark.parametrize("head_reads", ["self", "previous"])
def test_gradients_of_a_pack_are_the_sum_over_its_samples(head_reads: str) -> None:
    model = tiny_model(tiny_config(head_reads))
    samples = every_sample()
    counts = Objective.build(WEIGHTS, model.config.heads).counts(pack(samples, SPEC, SPECIAL))
    loss, together = gradients(model, samples, counts)
    alone = [gradients(model, [s], counts) for s in samples]
    summed = {name: sum((g[name] for _, g in alone[1:]), alone[0][1][name].clone()) for name in together}
    assert loss == pytest.approx(sum(part for part, _ in alone), rel=1e-5)
    assert_same_gradients(together, summed)


@pytest.mark.parametrize(
    "samples",
    [[], [text_sample()], [drawing_sample()], [perception_sample()], [editing_sample()]],
    ids=["nothing", "text", "drawing", "perception", "editing"],
)
def test_every_parameter_has_a_gradient_whatever_is_missing(samples: list[Sample]) -> None:
    model = tiny_model()
    _, found = gradients(model, samples)
    assert found.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(torch.isfinite(g).all() for g in found.values())


def test_nothing_trains_from_an_empty_pack() -> None:
    loss, found = gradients(tiny_model(), [])
    assert loss == 0
    assert all(not g.any() for g in found.values())


def test_pack_mates_do_not_change_a_sample() -> None:
    model = tiny_model()

    def hidden(samples: list[Sample]) -> Tensor:
        batch = pack(samples, SPEC, SPECIAL)
        return model(batch, made_up_latents(batch).noised).hidden

    alone = hidden([editing_sample()])
    among = hidden([text_sample(), editing_sample(), perception_sample()])
    start = len(hidden([text_sample()]))
    torch.testing.assert_close(among[start : start + len(alone)], alone, rtol=1e-5, atol=1e-5)


def branched_sample() -> tuple[Sample, list[Sample]]:
    """Three independent questions about one picture, the second answered by a box; and each asked alone."""
    box = Region(head="box", segment=4, token=0, image=0, boxes=torch.tensor([[0.1, 0.2, 0.5, 0.6]]))
    seen = Segment(kind="und_image", pixels=picture(1))
    exchanges = [
        (text(10, 11), text(12, supervised=True)),
        (text(13), text(5, supervised=True)),
        (text(14, 15, 16), text(17, 18, supervised=True)),
    ]
    branches = [replace(s, branch=k) for k, exchange in enumerate(exchanges, 1) for s in exchange]
    alone = [Sample(segments=(seen, *exchange)) for exchange in exchanges]
    alone[1] = replace(alone[1], regions=(replace(box, segment=2),))
    return Sample(segments=(seen, *branches), regions=(box,)), alone


def test_independent_questions_are_answered_as_if_each_was_asked_alone() -> None:
    model = tiny_model()

    def predict(sample: Sample) -> tuple[Tensor, Tensor]:
        batch = pack([sample], SPEC, SPECIAL)
        output = model(batch, made_up_latents(batch).noised)
        return output.logits, output.heads["box"].boxes

    branched, alone = branched_sample()
    with torch.no_grad():
        logits, boxes = predict(branched)
        expected = [predict(sample) for sample in alone]
    torch.testing.assert_close(logits, torch.cat([x for x, _ in expected]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(boxes, torch.cat([x for _, x in expected]), rtol=1e-5, atol=1e-5)

    # The same questions one after the other do see each other: the comparison can tell.
    chained = replace(branched, segments=tuple(replace(s, branch=0) for s in branched.segments))
    with torch.no_grad():
        assert (predict(chained)[0] - logits).abs().max() > 1e-2


def test_gradients_of_independent_questions_are_the_sum_over_the_questions() -> None:
    model = tiny_model()
    branched, alone = branched_sample()
    counts = Objective.build(WEIGHTS, model.config.heads).counts(pack([branched], SPEC, SPECIAL))
    loss, together = gradients(model, [branched], counts)
    apart, summed = gradients(model, alone, counts)
    assert loss == pytest.approx(apart, rel=1e-5)
    assert_same_gradients(together, summed)


@pytest.mark.parametrize("module", ["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"])
def test_decoder_layouts_have_the_expert_copies_they_are_named_for(module: str) -> None:
    model = tiny_model(tiny_config(layer_module=module))
    gradients(model, every_sample())
    names = [n for n, _ in model.named_parameters()]
    has_own_mlp, has_own_attention = (
        any(part in n for n in names) for part in ("mlp_moe_gen", "q_proj_moe_gen")
    )
    assert (has_own_mlp, has_own_attention) == {
        "Qwen2DecoderLayer": (False, False),
        "Qwen2MoEDecoderLayer": (True, False),
        "Qwen2MoTDecoderLayer": (True, True),
    }[module]


def test_freeze_und_sends_no_gradient_into_the_understanding_side() -> None:
    model = tiny_model(tiny_config(freeze_und=True))
    _, found = gradients(model, [drawing_sample()])
    for name in ("layers.0.mlp.up_proj.weight", "layers.0.self_attn.q_proj.weight", "embed_tokens.weight"):
        gradient = found.get(f"language_model.model.{name}")
        assert gradient is None or not gradient.any()
    assert found["language_model.model.layers.0.mlp_moe_gen.up_proj.weight"].any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@torch.no_grad()
def test_every_attention_back_end_gives_the_same_states() -> None:
    model, batch = tiny_model(), pack(every_sample(), SPEC, SPECIAL)
    flow = made_up_latents(batch)
    by_default = model(batch, flow.noised).hidden
    for model.attention in ATTENTION:
        torch.testing.assert_close(model(batch, flow.noised).hidden, by_default, rtol=0, atol=5e-6)


def without(flag: str) -> Bagel:
    return tiny_model(replace(tiny_config(), **{flag: False}))


@pytest.mark.parametrize(
    "flag, gone, sample",
    [
        ("visual_und", {"vit_model", "connector", "vit_pos_embed"}, drawing_sample()),
        ("visual_gen", {"time_embedder", "vae2llm", "llm2vae", "latent_pos_embed"}, perception_sample()),
    ],
)
def test_a_part_left_out_is_not_there_and_changes_nothing_else(
    flag: str, gone: set[str], sample: Sample
) -> None:
    whole, model = tiny_model(), without(flag)
    names = {n for n, _ in model.named_parameters()}
    assert names == {n for n, _ in whole.named_parameters() if n.split(".")[0] not in gone}
    model.load_state_dict({n: p for n, p in whole.state_dict().items() if n in names})
    samples = [sample, text_sample()]
    loss, found = gradients(model, samples)
    expected_loss, expected = gradients(whole, samples)
    assert loss == pytest.approx(expected_loss, rel=1e-6)
    assert_same_gradients(found, {n: expected[n] for n in found})
    assert {unit.fqn for unit in shard_plan(model.config)} <= {n for n, _ in model.named_modules()}


@pytest.mark.parametrize("flag", ["visual_und", "visual_gen"])
def test_a_pack_that_needs_what_is_left_out_is_refused(flag: str) -> None:
    with pytest.raises(ValueError, match=f"--{flag} False leaves out"):
        gradients(without(flag), [editing_sample()])


def test_freeze_und_trains_the_generation_side_and_the_output_layer() -> None:
    model = tiny_model(tiny_config(freeze_und=True))
    freeze(model, ParamArgs(freeze_und=True))
    samples = [s for s in every_sample() if not any(r.head == "detr" for r in s.regions)]
    _, found = gradients(model, samples)
    assert {group_of(n) for n in found} == {
        "llm_gen",
        "flow",
        "box",
        "mask",
        "detr",
        "detr_adapter",
        "embeddings",
    }
    assert "language_model.lm_head.weight" in found
    # A detector's phrases use the table as well; where there are none, it stays as it is.
    assert not found["language_model.model.embed_tokens.weight"].any()


def test_a_row_with_an_object_that_no_head_learns_is_named() -> None:
    model = tiny_model(replace(tiny_config(), heads={"mask": {"channels": 8}}))
    origins = [Origin(group="vqa", lane=0, position=i, where=f"rows.jsonl:{i}") for i in range(3)]
    samples = [text_sample(), perception_sample(), text_sample()]
    batch = pack([replace(s, origin=o) for s, o in zip(samples, origins, strict=True)], SPEC, SPECIAL)
    with pytest.raises(
        ValueError,
        match="group 'vqa': rows.jsonl:1: .* the box head, .*bagel_config.json names its heads: mask",
    ):
        model(batch, made_up_latents(batch).noised)
