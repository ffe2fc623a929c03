"""What is done to layers before sharding: what is computed twice, what is kept, how often something is compiled."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data.packing import pack
from data.types import PackedBatch, Sample
from modeling.bagel.bagel import Bagel
from modeling.bagel.shard_plan import ShardUnit, shard_plan
from tests.distributed.tiny_run import worst
from tests.unit.modeling.tiny import (
    SPEC,
    SPECIAL,
    drawing_sample,
    editing_sample,
    made_up_latents,
    numbers,
    perception_sample,
    text_sample,
    tiny_config,
    tiny_model,
)
from train.args import FsdpArgs
from train.config import build_args
from train.distributed.units import ROOT, describe_units, layers, units
from train.layers import prepare_layers, require_compiler

PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default")
ATTENTION = ("aten._softmax.default", "aten._scaled_dot_product_flash_attention_for_cpu.default")


class Watch(TorchDispatchMode):
    """Counts operations, and the bytes of what they made that is still there, views of a model's weights left out."""

    def __init__(self, model: Bagel) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()
        self._weights = {StorageWeakRef(p.untyped_storage()).cdata for p in model.parameters()}
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count[str(func)] += 1
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                made = StorageWeakRef(storage)
                self._made[made.cdata] = (made, storage.nbytes())
        return result

    def of(self, names: tuple[str, ...]) -> int:
        return sum(self.count[name] for name in names)

    def kept(self) -> int:
        there = (made for made in self._made.items() if made[0] not in self._weights)
        return sum(size for _, (made, size) in there if not made.expired())


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Of a forward and a backward: matrix products, attentions, bytes in between; and the gradients."""

    products: int
    attentions: int
    kept: int
    gradients: dict[str, Tensor]


def fsdp(**flags: object) -> FsdpArgs:
    return build_args({"recompute": False, "min_unit_params": 0, **flags}).fsdp


def prepared(**flags: object) -> Bagel:
    model, args = tiny_model(), fsdp(**flags)
    prepare_layers(model, layers(shard_plan(model.config), args), args, "cpu")
    return model


def cost(model: Bagel, *samples: Sample) -> Cost:
    batch = pack(list(samples), SPEC, SPECIAL)
    with Watch(model) as forward:
        loss = scalar(model, batch)
    kept = forward.kept()
    with Watch(model) as backward:
        loss.backward()
    return Cost(
        products=forward.of(PRODUCTS) + backward.of(PRODUCTS),
        attentions=forward.of(ATTENTION) + backward.of(ATTENTION),
        kept=kept,
        gradients=gradients(model),
    )


def scalar(model: Bagel, batch: PackedBatch) -> Tensor:
    out = model(batch, made_up_latents(batch).noised)
    return out.hidden.square().sum() + sum(numbers(h).sum() for h in out.heads.values())


def gradients(model: Bagel) -> dict[str, Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def test_what_is_run_again_and_what_is_kept() -> None:
    samples = perception_sample(), editing_sample()
    plain = cost(prepared(), *samples)
    full = cost(prepared(recompute=True), *samples)
    selective = cost(prepared(recompute=True, recompute_mode="selective"), *samples)
    second = cost(prepared(recompute=True, recompute_every=2), *samples)
    for other in (full, selective, second):
        assert other.gradients.keys() == plain.gradients.keys()
        assert all(torch.equal(g, plain.gradients[n]) for n, g in other.gradients.items())
    assert selective.products == plain.products and selective.attentions == plain.attentions
    assert full.products > second.products > plain.products
    assert full.attentions > plain.attentions > 0
    assert full.kept < selective.kept < plain.kept
    assert full.kept < second.kept < plain.kept


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # torch's own, while it traces
def test_packs_of_any_length_are_compiled_a_few_times_only() -> None:
    model, plain = prepared(compile=True, compile_backend="aot_eager"), prepared()
    samples = {"t": text_sample(), "d": drawing_sample(), "s": perception_sample()}
    counters.clear()
    scalar(model, pack([samples[k] for k in "ds"], SPEC, SPECIAL)).backward()
    model.zero_grad()
    compiled = counters["stats"]["unique_graphs"]
    for kind in ("tds", "ddss", "tttds", "dsss", "ttttttttds", "sd"):
        batch = pack([samples[k] for k in kind], SPEC, SPECIAL)
        for m in (model, plain):
            scalar(m, batch).backward()
        assert worst(gradients(model), gradients(plain), relative=True) < 1e-5
    # Six packs of other lengths. Compiled for one length, they would have been six times four graphs, for layers alike.
    assert compiled == 4
    assert compiled <= counters["stats"]["unique_graphs"] <= compiled + 4


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.filterwarnings("ignore")  # torch's own, of its parts about each other
def test_a_compiled_step_with_a_real_compiler() -> None:
    try:
        require_compiler("inductor", "cpu")
    except ValueError as error:
        pytest.skip(str(error))
    batch = pack([perception_sample()], SPEC, SPECIAL)
    compiled, plain, args = tiny_model(), tiny_model(), fsdp(compile=True)
    # The tower's layers alone: a compiler needs minutes for the decoder's.
    tower = [layer for layer in layers(shard_plan(plain.config), args) if layer.fqn.startswith("vit_model")]
    prepare_layers(compiled, tower, args, "cpu")
    for model in (compiled, plain):
        scalar(model, batch).backward()
    assert worst(gradients(compiled), gradients(plain), relative=True) < 1e-5


def test_no_compiler_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder
    from torch._inductor.exc import InvalidCxxCompiler

    def none() -> str:
        raise InvalidCxxCompiler()

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(ValueError, match="--compile needs a C"):
        prepared(compile=True)
    require_compiler("aot_eager", "cpu")


def test_units_and_what_is_said_of_them() -> None:
    with torch.device("meta"):
        model = Bagel(tiny_config())
    plan = shard_plan(model.config)
    for p in model.vit_model.parameters():
        p.requires_grad_(False)
    every = units(model, plan, fsdp())
    assert {unit.fqn for unit in every} == {unit.fqn for unit in plan} | {ROOT}
    assert every[-1].fqn == ROOT and not every[-1].reshard
    assert sum(unit.parameters for unit in every) == sum(p.numel() for p in model.parameters())
    assert sum(unit.trained for unit in every) == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )
    assert not any(unit.reshard for unit in units(model, plan, fsdp(sharding_strategy="SHARD_GRAD_OP")))
    told = describe_units(model, plan, fsdp(recompute=True, compile=True), 4)
    assert "language_model.model.layers.0-1" in told and "vit_model.vision_model.encoder.layers.0-1" in told
    assert told.count("freed, full recomputation, compiled") == 2 and "(everything else)" in told
    inside = describe_units(model, plan, fsdp(recompute=True, recompute_every=2, min_unit_params=10**9), 4)
    assert "in the unit around them: 4, 2 of them with full recomputation" in inside


def test_tied_weights_in_two_units_are_refused() -> None:
    with torch.device("meta"):
        model = Bagel(tiny_config(tie_word_embeddings=True))
    plan = (*shard_plan(model.config), ShardUnit("language_model.lm_head"))
    with pytest.raises(ValueError, match="embed_tokens.weight.*tied|lm_head.weight.*tied"):
        units(model, plan, fsdp())
    assert units(model, shard_plan(model.config), fsdp())
