"""Every row of every table, on the day it is added: it is documented, builds small and does its basic job.

Datasets and metrics have the deeper sweeps over their tables in data/test_datasets.py and metrics/test_metrics.py.
"""

import inspect
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from data.dataset_info import DATASET_REGISTRY
from data.packing import pack
from data.policy import POLICIES
from data.sources import FORMATS
from data.tokens import ANCHORS, PICTURE_HEADS
from data.transforms import TRANSFORMS, build_transform
from data.types import EMPTY_PIXELS, RegionBatch, Sample
from modeling.adapters import TARGETS, LoraSpec, add_adapters
from modeling.bagel.bagel import Bagel
from modeling.heads import HEADS
from modeling.losses import LOSSES
from modeling.qwen2.model import Vocabulary
from modeling.types import DetrOutput, FeatureGrids, HeadInputs, LossTerm
from tests.unit.modeling.tiny import (
    MASK_HEADS,
    SPEC,
    SPECIAL,
    every_sample,
    made_up_latents,
    mask_config,
    numbers,
    text_sample,
    tiny_model,
)
from train.args import LossArgs, ParamArgs
from train.metrics import METRICS
from train.metrics.base import SummedMetric
from train.objective import Objective
from train.param_manager import PARAM_GROUPS, group_of

DOCUMENTED = {
    **{f"dataset {name}": row for name, row in DATASET_REGISTRY.items()},
    **{f"transform {name}": row for name, row in TRANSFORMS.items()},
    **{f"head {name}": row for name, row in HEADS.items()},
    **{f"loss {name}": row.values for name, row in LOSSES.items()},
    **{f"things of {name}": row.things for name, row in LOSSES.items()},
    **{f"metric {name}": row for name, row in METRICS.items()},
    **{f"packing policy {name}": row.next_samples for name, row in POLICIES.items()},
}

TRANSFORM_ARGS = {
    "image": {"image_stride": 8, "max_image_size": 64, "min_image_size": 16},
    "sam": {"image_size": 64},
}
"""Row -> arguments that build it at a tiny size; its pictures' sides are multiples of `image_stride`, if it has one."""


@pytest.mark.parametrize("row", DOCUMENTED)
def test_every_row_is_documented(row: str) -> None:
    assert inspect.cleandoc(DOCUMENTED[row].__doc__ or ""), f"{row}: say in one sentence what it is"


@pytest.mark.parametrize("name", DATASET_REGISTRY)
def test_dataset_options_can_be_left_out(name: str) -> None:
    options = DATASET_REGISTRY[name].options()
    assert [n for n, option in options.items() if option.default is inspect.Parameter.empty] == []


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_names_what_is_missing_under_the_key_it_is_read_from(name: str, tmp_path: Path) -> None:
    for key in FORMATS[name].keys:
        with pytest.raises(ValueError, match=rf"gone.*check '{FORMATS[name].keys[0]}' in dataset_info"):
            FORMATS[name].open({key: str(tmp_path / "gone")}, None)


@pytest.mark.parametrize("name", DATASET_REGISTRY)
def test_a_dataset_class_reads_a_format_that_there_is(name: str) -> None:
    assert DATASET_REGISTRY[name].source_format in FORMATS


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transform(name: str) -> None:
    transform = build_transform({"type": name, **TRANSFORM_ARGS[name]})
    rng = np.random.default_rng(0)
    for width, height in ((40, 30), (16, 200), (7, 7)):
        picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        pixels = transform(picture, 1)
        assert pixels.dtype == torch.uint8 and pixels.shape[0] == 3 and pixels.numel() > 0
        assert all(side % TRANSFORM_ARGS[name].get("image_stride", 1) == 0 for side in pixels.shape[1:])
        assert torch.equal(pixels, transform(picture, 1)), "the same picture gives the same pixels"


def build_head(name: str) -> nn.Module:
    torch.manual_seed(0)
    options = {key: value for key, value in MASK_HEADS.get(name, {}).items() if key != "type"}
    return HEADS[name](hidden_size=32, grid_size=24, patch_size=8, **options)


def inputs(hidden: Tensor, image: Tensor, grids: FeatureGrids, *, known: bool = False) -> HeadInputs:
    """Regions of which nothing is known, as at inference; or a named box in each."""
    regions = RegionBatch.unknown(torch.zeros_like(image), image)
    if known:
        one = torch.ones_like(image)
        boxes = torch.tensor([[0.1, 0.2, 0.6, 0.7]]).expand(len(image), -1)
        regions = replace(
            regions, boxes=boxes, num_boxes=one, phrase_ids=3 * one.repeat(2), phrase_lens=2 * one
        )
    return HeadInputs(
        hidden=hidden,
        regions=regions,
        grids=grids,
        embed=nn.Embedding(16, 32),
        vocabulary=Vocabulary(32, 16, bias=False),
    )


def random_grids() -> FeatureGrids:
    """Two pictures of 16x24 and 8x8 px."""
    pixels = torch.randint(0, 256, (7, 3 * 8 * 8), dtype=torch.uint8)
    return FeatureGrids(
        values=torch.randn(7, 24, requires_grad=True),
        states=torch.randn(7, 32, requires_grad=True),
        pixels=pixels,
        hw=((2, 3), (1, 1)),
        patch_size=8,
        views=(EMPTY_PIXELS, EMPTY_PIXELS),
    )


NO_GRIDS = FeatureGrids(
    values=torch.zeros(0, 24),
    states=torch.zeros(0, 32),
    pixels=torch.zeros(0, 192, dtype=torch.uint8),
    hw=(),
    patch_size=8,
)


@pytest.mark.parametrize("name", HEADS)
def test_head_reads_states_and_grids(name: str) -> None:
    head, grids = build_head(name), random_grids()
    hidden = torch.randn(3, 32, requires_grad=True)
    image = torch.tensor([1, 0, 0])
    output = head(inputs(hidden, image, grids, known=True))
    assert HEADS[name].predicts in {*ANCHORS, *PICTURE_HEADS}, "data/tokens.py says what it reads"
    if isinstance(output, DetrOutput):
        assert all(bool(((s.boxes >= 0) & (s.boxes <= 1)).all()) for s in output.stages)
    elif output.mask_hw:
        assert output.mask_hw == ((8, 8), (16, 24), (16, 24)) and len(output.mask_logits) == 64 + 2 * 384
    else:
        assert output.boxes.shape == (3, 4) and bool(((output.boxes >= 0) & (output.boxes <= 1)).all())
    numbers(output).square().sum().backward()
    trained = [(name, p) for name, p in head.named_parameters() if p.requires_grad]
    looks = [] if name in ("autoencoder", "embedding") else [("grid", grids.values)]
    for what, x in (("state", hidden), *looks, *trained):
        assert x.grad is not None and bool(x.grad.any()), f"no gradient reaches {what}"


@pytest.mark.parametrize("name", HEADS)
def test_head_without_regions_gives_zero_gradients_not_none(name: str) -> None:
    head, nothing = build_head(name), torch.zeros(0, dtype=torch.int64)
    for grids in (random_grids(), NO_GRIDS):
        head.zero_grad()
        output = head(inputs(torch.zeros(0, 32), nothing, grids))
        numbers(output).square().sum().backward()
        assert all(p.grad is not None and not p.grad.any() for p in head.parameters() if p.requires_grad)


def model_with(loss: str) -> Bagel:
    """A model whose heads give what a loss needs."""
    heads = {"iou": "sam", "code": "autoencoder"}
    return tiny_model(mask_config(heads.get(LOSSES[loss].field or "", "mask")))


def loss_term(name: str, samples: list[Sample], model: Bagel) -> LossTerm:
    """The loss of a pack of these samples."""
    batch = pack(samples, SPEC, SPECIAL)
    flow = made_up_latents(batch)
    (term,) = Objective({name: 1.0}).terms(model(batch, flow.noised), batch, flow)
    return term


def count(term: LossTerm) -> float:
    assert term.each.shape == term.things.place.shape == term.things.amount.shape
    assert term.each.sum().item() == pytest.approx(term.total.item())
    return float(term.things.amount.sum())


@pytest.mark.parametrize("name", LOSSES)
def test_loss_sums_over_samples(name: str) -> None:
    model = model_with(name)
    whole = loss_term(name, every_sample(), model)
    alone = [loss_term(name, [sample], model) for sample in every_sample()]
    assert count(whole) > 0 and whole.total.dtype == torch.float32
    assert count(whole) == pytest.approx(sum(count(t) for t in alone))
    assert whole.total.item() == pytest.approx(sum(t.total.item() for t in alone), rel=1e-4)
    whole.total.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(bool(g.isfinite().all()) for g in gradients) and any(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("name", [n for n in LOSSES if not n.startswith("ce")])
def test_loss_of_an_absent_modality_is_nothing(name: str) -> None:
    term = loss_term(name, [text_sample()], model_with(name))
    assert count(term) == 0 and term.total.item() == 0 and term.total.requires_grad


def test_every_loss_has_a_weight_flag_and_a_known_head() -> None:
    used = LossArgs().weights() | LossArgs(ce_loss_reweighting=True).weights()
    assert set(used) == set(LOSSES)
    assert {row.head for row in LOSSES.values()} <= {None, *(head.predicts for head in HEADS.values())}


@pytest.mark.parametrize("name", METRICS)
def test_metric_starts_at_zero_and_only_adds(name: str) -> None:
    empty = METRICS[name]()
    assert isinstance(empty, SummedMetric)
    assert not any(getattr(empty, f.name) for f in fields(empty)), "sums start at zero, lists empty"
    assert empty.merge(METRICS[name]()) == empty


def test_every_trained_parameter_has_a_group_and_every_group_parameters() -> None:
    model = tiny_model()
    add_adapters(model, LoraSpec(pattern=TARGETS["mot_und"], rank=2, alpha=2))
    models = (model, tiny_model(mask_config("separate")))
    groups = {group_of(n) for m in models for n, p in m.named_parameters() if p.requires_grad}
    assert groups == set(PARAM_GROUPS)


@pytest.mark.parametrize("name", PARAM_GROUPS)
def test_param_group_names_flags_that_exist(name: str) -> None:
    row, flags = PARAM_GROUPS[name], {f.name for f in fields(ParamArgs)}
    assert row.lr and {*row.freeze, *row.lr} <= flags
    assert row.freeze or name == "lora", "adapters that are not trained are not made"
