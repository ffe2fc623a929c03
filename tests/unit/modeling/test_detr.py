"""The detector: matching and losses against the reference's numbers, and what the head promises."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from data.packing import pack
from data.types import Sample
from modeling.bagel.bagel import Bagel
from modeling.losses.detection import _over_boxes, _score_errors
from modeling.ops.boxes import centre_to_corners, paired_giou
from modeling.ops.matching import MatchCost, assign, match_costs
from modeling.types import DetrOutput, DetrStage, HeadInputs, ModelOutput
from tests.unit.modeling.tiny import (
    SPEC,
    SPECIAL,
    TINY_DETR,
    demonstrated_sample,
    detection_sample,
    made_up_latents,
    picture,
    text,
    text_sample,
    tiny_config,
    tiny_model,
)
from train.objective import Objective

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding"


def golden(stem: str) -> tuple[Any, dict[str, Tensor]]:
    meaning = json.loads((GOLDEN / f"{stem}.json").read_text(encoding="utf-8"))
    return meaning, load_file(GOLDEN / f"{stem}.safetensors")


CASES, NUMBERS = golden("detr_matching")


def stage_of(case: dict[str, Any]) -> tuple[DetrStage, list[Tensor], list[Tensor]]:
    """Predictions of a case with gradient, and classes and boxes of each picture."""
    name = case["id"]
    logits = NUMBERS[f"{name}.logits"].clone().requires_grad_()
    boxes = NUMBERS[f"{name}.pred_boxes_cxcywh"].clone().requires_grad_()
    valid = torch.ones(logits.shape[:2], dtype=torch.bool)
    pictures = range(case["batch"])
    classes = [NUMBERS[f"{name}.target{j}.labels"] for j in pictures]
    truth = [NUMBERS[f"{name}.target{j}.boxes_cxcywh"].reshape(-1, 4) for j in pictures]
    return DetrStage(logits, boxes, valid), classes, truth


def matched(stage: DetrStage, classes: list[Tensor], truth: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`(match, costs r q t)` with the published costs 1, 5, 2."""
    counts = [len(c) for c in classes]
    called = torch.zeros(len(counts), max(counts), dtype=torch.int64)
    boxes = torch.full((len(counts), max(counts), 4), 0.5)
    for j, count in enumerate(counts):
        called[j, :count], boxes[j, :count] = classes[j], truth[j]
    cost = match_costs(
        stage.logits, stage.boxes, called, boxes, with_none=True, cost=MatchCost(score=1, l1=5, giou=2)
    )
    return assign([cost], counts)[0], cost


@pytest.mark.parametrize("case", CASES["cases"], ids=lambda c: c["id"])
def test_matching_and_losses_as_the_reference(case: dict[str, Any]) -> None:
    stage, classes, truth = stage_of(case)
    match, cost = matched(stage, classes, truth)
    queries, start = case["queries"], 0
    for j, expected in enumerate(case["matched"]):
        own = match[start : start + len(classes[j])]
        start += len(classes[j])
        pairs = sorted((int(q) - j * queries, t) for t, q in enumerate(own) if q >= 0)
        assert pairs == list(zip(expected["pred"], expected["target"], strict=True))
        if f"{case['id']}.cost{j}" in NUMBERS and len(classes[j]):
            torch.testing.assert_close(
                cost[j, :, : len(classes[j])], NUMBERS[f"{case['id']}.cost{j}"], atol=1e-5, rtol=1e-5
            )

    count = max(1, len(match))
    scores = _score_errors(stage, match, torch.cat(classes), 0.1)
    found = (match >= 0).sum()
    ce = scores.sum() / (found + 0.1 * (stage.valid.numel() - found))
    output = DetrOutput(
        stages=(stage,), matched=(match,), classes=torch.cat(classes), no_object_weight=0.1,
        states=stage.boxes, picture=(), phrase_states=stage.boxes, phrase_known=stage.valid,
    )  # fmt: skip
    every = torch.cat(truth)
    l1 = _over_boxes(output, every, lambda a, b: (a - b).abs().sum(1)).total / count
    corners = centre_to_corners(every)
    giou = (
        _over_boxes(output, corners, lambda a, b: 1 - paired_giou(centre_to_corners(a), b)[1]).total / count
    )
    assert ce.item() == pytest.approx(case["loss_ce"], abs=1e-5)
    assert l1.item() == pytest.approx(case["loss_bbox"], abs=1e-5)
    assert giou.item() == pytest.approx(case["loss_giou"], abs=1e-5)
    total = ce + 5 * l1 + 2 * giou
    assert total.item() == pytest.approx(case["loss"], abs=1e-5)
    total.backward()
    for what, x in (("logits", stage.logits), ("boxes", stage.boxes)):
        grad = torch.zeros_like(x) if x.grad is None else x.grad
        torch.testing.assert_close(grad, NUMBERS[f"{case['id']}.grad_{what}"], atol=1e-5, rtol=1e-5)


def test_boxes_as_the_reference() -> None:
    meaning, numbers = golden("box_losses")
    for pair in meaning["pairwise"]:
        a, b = numbers[f"{pair['id']}.a_xyxy"], numbers[f"{pair['id']}.b_xyxy"]
        iou, giou = paired_giou(a[:, None], b[None])
        torch.testing.assert_close(iou, numbers[f"{pair['id']}.iou"], atol=1e-5, rtol=0)
        torch.testing.assert_close(giou, numbers[f"{pair['id']}.giou"], atol=1e-5, rtol=0)
        torch.testing.assert_close(centre_to_corners(numbers[f"{pair['id']}.a_cxcywh"]), a)
    for case in meaning["perceptiongpt_box_loss"]:
        found, true = numbers[f"{case['id']}.pred"], numbers[f"{case['id']}.gt_xyxy"]
        assert F.l1_loss(found, true).item() == pytest.approx(case["l1_mean"], abs=1e-5)
        # The reference sorts the corners of an inverted box, which no head of ours can give.
        low, high = torch.minimum(found[:, :2], found[:, 2:]), torch.maximum(found[:, :2], found[:, 2:])
        giou = (1 - paired_giou(torch.cat([low, high], 1), true)[1]).mean().item()
        assert giou == pytest.approx(case["giou_corrected_xyxy_mean"], abs=1e-5)
    for case in meaning["acc"]:
        iou = paired_giou(numbers[f"{case['id']}.pred_xyxy"], numbers[f"{case['id']}.gt_xyxy"])[0]
        torch.testing.assert_close(iou, numbers[f"{case['id']}.iou"], atol=1e-5, rtol=0)


# ---------------------------------------------------------------------------------------------------------- the head


def run(model: Bagel, *samples: Sample) -> ModelOutput:
    batch = pack(samples, SPEC, SPECIAL)
    output: ModelOutput = model(batch, made_up_latents(batch).noised)
    return output


def with_detr(**options: Any) -> Bagel:
    return tiny_model(replace(tiny_config(), heads={"detr": {**TINY_DETR, **options}}))


def losses(model: Bagel, *samples: Sample) -> dict[str, float]:
    """Mean of each loss of the detector over a pack."""
    objective = Objective({f"det_{name}": 1.0 for name in ("objectness", "l1", "giou", "caption")})
    batch = pack(samples, SPEC, SPECIAL)
    flow = made_up_latents(batch)
    terms = objective.terms(model(batch, flow.noised), batch, flow)
    objective.scalar(terms, objective.counts(batch)).backward()
    return objective.means(torch.stack([t.total.detach() for t in terms]), objective.counts(batch).tolist())


def changed(sample: Sample, **region: Any) -> Sample:
    return replace(sample, regions=tuple(replace(r, **region) for r in sample.regions))


def test_answer_tokens_do_not_change_what_is_detected() -> None:
    model, sample = with_detr(), detection_sample()
    other = replace(sample, segments=(*sample.segments[:2], text(40, 41, 42, supervised=True)))
    with torch.no_grad():
        a, b = run(model, sample), run(model, other)
        asked = run(model, replace(sample, segments=(text(12, 13), *sample.segments[1:])))
    assert not torch.equal(a.hidden[-3:], b.hidden[-3:])
    for one, two, three in zip(*(o.heads["detr"].stages for o in (a, b, asked)), strict=True):
        assert torch.equal(one.boxes, two.boxes) and torch.equal(one.logits, two.logits)
        assert not torch.equal(one.logits, three.logits), "what precedes the picture is seen"
    assert torch.equal(a.heads["detr"].phrase_states, b.heads["detr"].phrase_states)


def test_a_picture_is_seen_alone() -> None:
    model, sample = with_detr(), detection_sample()
    small = replace(
        sample, segments=(text(10), replace(sample.segments[1], pixels=picture(3, 16, 8)), text(9))
    )
    with torch.no_grad():
        alone, together = run(model, sample).heads["detr"], run(model, small, sample).heads["detr"]
    assert [len(s.boxes) for s in together.stages] == [2, 2, 2]
    torch.testing.assert_close(together.stages[-1].boxes[1], alone.stages[-1].boxes[0], atol=1e-5, rtol=1e-5)
    assert together.stages[0].valid.sum().tolist() == 64 + 2, (
        "cells that the small picture lacks are left out"
    )


def test_order_of_the_true_boxes_does_not_matter() -> None:
    sample = detection_sample()
    (region,) = sample.regions
    turned = changed(sample, boxes=region.boxes.flip(0), phrases=region.phrases[::-1])
    assert losses(with_detr(), sample) == pytest.approx(losses(with_detr(), turned), rel=1e-5)


@pytest.mark.parametrize("no_object_weight", [None, 0.1])
def test_a_picture_without_boxes_teaches_that_there_is_nothing(no_object_weight: float | None) -> None:
    model = with_detr(no_object_weight=no_object_weight)
    means = losses(model, changed(detection_sample(), boxes=torch.zeros(0, 4), phrases=()))
    assert means["det_objectness"] > 0 and means["det_l1"] == means["det_giou"] == means["det_caption"] == 0
    assert model.heads["detr"].get_parameter("score.bias").grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.heads.parameters())


def test_more_objects_than_queries() -> None:
    boxes = torch.rand(7, 2, generator=torch.Generator().manual_seed(0)) * 0.7
    crowd = changed(
        detection_sample(),
        boxes=torch.cat([boxes, boxes + 0.2], dim=1),
        phrases=tuple(torch.tensor([i, 2]) for i in range(7)),
    )
    (output,) = [run(with_detr(), crowd).heads["detr"]]
    assert [int((m >= 0).sum()) for m in output.matched] == [7, 5, 5], "64 cells, then 5 queries"
    assert int(output.phrase_known.sum()) == 10
    assert all(torch.tensor(list(losses(with_detr(), crowd).values())).isfinite())


def test_a_cost_that_is_not_finite_is_survived() -> None:
    cost = torch.tensor([[[float("nan"), 1.0], [float("inf"), 2.0], [0.0, 3.0]]])
    assert assign([cost], [2])[0].tolist() == [2, 0]


@pytest.mark.parametrize("no_object_weight", [None, 0.1])
def test_a_table_of_classes(no_object_weight: float | None) -> None:
    table = [[30, 31], [32], [33]]
    model = with_detr(caption="classes", class_ids=table, no_object_weight=no_object_weight)
    output = run(model, detection_sample()).heads["detr"]
    assert output.classes.tolist() == [0, 1]
    assert output.stages[-1].logits.shape[-1] == 3 + (no_object_weight is not None)
    means = losses(model, detection_sample())
    assert means["det_objectness"] > 0 and means["det_caption"] == 0
    assert model.language_model.model.embed_tokens.weight.grad[33].any(), "names are embedded words"
    with pytest.raises(ValueError, match=r"token ids \[30, 31, 2\] is none of the 2 of class_ids"):
        run(with_detr(caption="classes", class_ids=[[1], [2]]), detection_sample())


def test_learns_where_things_are_and_what_they_are_called() -> None:
    model, sample = with_detr(width=32), detection_sample()
    batch = pack([sample], SPEC, SPECIAL)
    head, flow = model.heads["detr"], made_up_latents(batch)
    with torch.no_grad():
        output = model(batch, flow.noised)
    inputs = model.head_inputs(
        output.hidden[batch.regions["detr"].anchor], batch.regions["detr"], output.grids
    )
    objective = Objective({"det_objectness": 2.0, "det_l1": 5.0, "det_giou": 2.0, "det_caption": 1.0})
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    curve = []
    for _ in range(50):
        terms = objective.terms(replace(output, heads={"detr": head(inputs)}), batch, flow)
        objective.scalar(terms, objective.counts(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append({t.name: t.total.item() for t in terms})
    first, last = curve[0], curve[-1]
    assert last["det_l1"] < 0.2 * first["det_l1"] and last["det_caption"] < 0.2 * first["det_caption"]
    found = detections(model.eval(), sample)
    assert [d.ids for d in sorted(found, key=lambda d: d.box[0])] == [(30, 31), (32,)]
    for d, true in zip(sorted(found, key=lambda d: d.box[0]), sample.regions[0].boxes, strict=True):
        assert float(paired_giou(torch.tensor([d.box]), true[None])[0]) > 0.8


def detections(model: Bagel, sample: Sample) -> Sequence[Any]:
    """What is found with a score of at least 0.3 where nothing is known."""
    unknown = changed(sample, boxes=torch.zeros(0, 4), phrases=())
    batch = pack([unknown], SPEC, SPECIAL)
    with torch.no_grad():
        output = model(batch, made_up_latents(batch).noised)
        inputs: HeadInputs = model.head_inputs(output.hidden[:0], batch.regions["detr"], output.grids)
        return model.heads["detr"].detections(output.heads["detr"], inputs, threshold=0.3, end=2)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"memory": "ears"}, "memory must be one of vision, states, both, not 'ears'"),
        ({"width": 18, "num_heads": 3}, "width 18 must be a multiple of 4 and of num_heads 3"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"caption": "classes"}, "class_ids .* is for caption classes, and needed there"),
        ({"references": "none"}, "references must be one of learned, selected"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"bagel_config.json: heads.detr: {message}"):
        with_detr(**options)


@pytest.mark.parametrize("memory", ["vision", "states"])
def test_one_memory_and_learned_places(memory: str) -> None:
    model = with_detr(memory=memory, references="learned", adapter_ratio=0, auxiliary=False, caption="none")
    output = run(model, detection_sample()).heads["detr"]
    assert len(output.stages) == 1 and output.stages[0].boxes.shape == (1, 5, 4)
    assert losses(model, detection_sample())["det_l1"] > 0
    assert all(p.grad is not None for p in model.heads.parameters())


def test_detached_states_teach_the_trunk_nothing() -> None:
    model = with_detr(detach_states=True, caption="none", memory="states")
    losses(model, detection_sample(), text_sample())
    grads = [p.grad for p in model.language_model.model.layers.parameters()]
    assert not any(g is not None and g.any() for g in grads)


def test_answers_of_teachers_and_students_are_reported_apart() -> None:
    model, batch = with_detr(), pack([demonstrated_sample(), text_sample()], SPEC, SPECIAL)
    flow = made_up_latents(batch)
    for weight in (0.0, 0.5):
        objective = Objective({"ce": 1.0, "teacher_lm": weight, "student_lm": weight})
        ce, teacher, student = objective.terms(model(batch, flow.noised), batch, flow)
        assert objective.counts(batch).tolist() == [8, 3, 2], "of every answer its tokens and its end"
        torch.testing.assert_close(ce.each[:3], teacher.each)
        torch.testing.assert_close(ce.each[3:5], student.each)
        assert teacher.total.requires_grad == student.total.requires_grad == bool(weight)
