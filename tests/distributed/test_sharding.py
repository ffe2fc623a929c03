"""Sharded training is single-process training: same gradients, whatever the strategy, ranks and accumulation."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import UNITS, Toy, build, fsdp_args, rows, starting_value, toy_args
from train.distributed.collectives import (
    all_sum,
    ask_main,
    gather_objects,
    on_main,
    rank,
    world_size,
)
from train.distributed.mesh import build_mesh, mesh_shape
from train.distributed.sharding import grad_norm, materialise, shard_model, sync_gradients
from train.optim import clip_factor, set_learning_rates

NUM_ROWS = 12
PIECES = (1, 4, 0, 7)
"""Rows of each micro-batch: uneven, one empty."""


def gradients(flags: dict[str, object], accumulate: int) -> tuple[dict[str, Tensor], float]:
    """Summed gradients of one step over all ranks, and their norm."""
    args = toy_args(**flags)
    model = build(args).model
    x, y = rows(NUM_ROWS)
    cuts = torch.split(torch.arange(NUM_ROWS), PIECES)
    own = cuts[rank() * accumulate : (rank() + 1) * accumulate]
    for i, cut in enumerate(own):
        sync_gradients(model, args.fsdp, last=i == len(own) - 1)
        ((model(x[cut]).boxes - y[cut]).square().sum() / NUM_ROWS).backward()
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    grads = full_tensors((n, p.grad) for n, p in trained)
    return grads, float(grad_norm(p for _, p in trained))


def reference() -> dict[str, Tensor]:
    model = build(toy_args(), sharded=False).model
    x, y = rows(NUM_ROWS)
    ((model(x).boxes - y).square().sum() / NUM_ROWS).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


CASES = [
    (2, 2, {"sharding_strategy": "FULL_SHARD"}),
    (2, 2, {"sharding_strategy": "FULL_SHARD", "min_unit_params": 40}),
    (2, 2, {"sharding_strategy": "SHARD_GRAD_OP"}),
    (2, 2, {"sharding_strategy": "NO_SHARD"}),
    (2, 2, {"sharding_strategy": "FULL_SHARD", "cpu_offload": True}),
    (1, 4, {"sharding_strategy": "HYBRID_SHARD"}),
    (2, 2, {"sharding_strategy": "HYBRID_SHARD", "num_replicate": 2}),
    (4, 1, {"sharding_strategy": "HYBRID_SHARD", "num_replicate": 2}),
]


@pytest.mark.parametrize(("num_ranks", "accumulate", "flags"), CASES)
def test_gradients_are_those_of_one_process(
    num_ranks: int, accumulate: int, flags: dict[str, object]
) -> None:
    expected = reference()
    (grads, norm), *others = run_distributed(gradients, num_ranks, flags, accumulate)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-5, atol=1e-7, msg=name)
    expected_norm = torch.cat([g.flatten() for g in expected.values()]).norm().item()
    assert norm == pytest.approx(expected_norm, rel=1e-6)
    assert all(other_norm == norm for _, other_norm in others)


BF16 = {"param_dtype": "bf16", "reduce_dtype": "bf16"}
SHARDED_WAYS: tuple[dict[str, object], ...] = (
    {"sharding_strategy": "FULL_SHARD"},
    {"sharding_strategy": "SHARD_GRAD_OP"},
    {"sharding_strategy": "HYBRID_SHARD", "num_replicate": 2},
    {"sharding_strategy": "NO_SHARD"},
)


def accumulated_in_bf16(
    ways: Sequence[dict[str, object]],
) -> list[tuple[dict[str, Tensor], dict[str, Tensor], bool]]:
    """For each way: the gradient of four micro-batches, the float32 sum of their gradients one by one, and whether anything but
    float32 pieces was kept between them.
    """
    x, y = (part.chunk(world_size())[rank()].chunk(4) for part in rows(4 * NUM_ROWS))
    results = []
    for way in ways:
        args = toy_args(**BF16, **way)
        model = build(args).model
        trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

        def backward(i: int, *, last: bool, model: Any = model, args: Any = args) -> None:
            sync_gradients(model, args.fsdp, last=last)
            (model(x[i]).boxes - y[i]).square().sum().backward()

        one_by_one: dict[str, Tensor] = {}
        for i in range(4):
            backward(i, last=True)
            for name, grad in full_tensors((n, p.grad) for n, p in trained).items():
                one_by_one[name] = one_by_one.get(name, 0.0) + grad
            model.zero_grad(set_to_none=True)
        kept_whole = False
        for i in range(4):
            backward(i, last=i == 3)
            # Between micro-batches there is a gradient of the pieces, in float32, and only that.
            kept_whole |= any(p.grad is None or p.grad.dtype != torch.float32 for _, p in trained)
        results.append((full_tensors((n, p.grad) for n, p in trained), one_by_one, kept_whole))
    return results


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_micro_batches_in_bf16_are_added_up_in_float32_and_in_pieces(num_ranks: int) -> None:
    ways = SHARDED_WAYS if num_ranks > 1 else SHARDED_WAYS[:1]
    for way, (found, expected, kept_whole) in zip(
        ways, run_distributed(accumulated_in_bf16, num_ranks, ways)[0], strict=True
    ):
        assert not kept_whole, way
        for name, grad in found.items():
            assert torch.equal(grad, expected[name]), (way, name)
        # Each is a sum that bf16 has no number for: rounded after all, it would not be equal.
        assert any(not torch.equal(x, x.bfloat16().float()) for x in found.values())


def three_steps(flags: dict[str, object]) -> dict[str, Tensor]:
    args = toy_args(**flags)
    state = build(args)
    x, y = (part.chunk(world_size())[rank()] for part in rows(NUM_ROWS))
    for step in range(3):
        set_learning_rates(state.optimizer, step, args.optim)
        ((state.model(x).boxes - y).square().sum() / NUM_ROWS).backward()
        norm = float(grad_norm(state.model.parameters()))
        state.optimizer.step(factor=clip_factor(norm, 0.1))
        state.optimizer.zero_grad()
    return full_tensors(state.model.named_parameters())


def test_strategies_reach_the_same_weights_and_bf16_is_near() -> None:
    expected, *_ = run_distributed(three_steps, 1, {})
    for strategy in ("FULL_SHARD", "NO_SHARD"):
        weights, *_ = run_distributed(three_steps, 2, {"sharding_strategy": strategy})
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=2e-6, msg=name)
    weights, *_ = run_distributed(three_steps, 2, {"param_dtype": "bf16"})
    assert all(value.dtype == torch.float32 for value in weights.values())
    worst = max((value - expected[name]).abs().max().item() for name, value in weights.items())
    assert worst < 0.05  # three steps of at most 0.01 each, whatever the sign


def full_disk() -> None:
    raise OSError("disk is full")


def small_tools() -> list[object]:
    x = torch.tensor([float(rank()), 1.0])
    failures = []
    for action in (full_disk, lambda: {}["key"]):  # type: ignore[misc]
        try:
            on_main(action)
        except ValueError as error:
            failures.append(str(error))
        try:
            ask_main(None, lambda values, action=action: action())
        except ValueError as error:
            failures.append(str(error))
    seen: list[int] = []
    doubled = ask_main(rank(), lambda values: [2 * x for x in seen.extend(values) or values])
    return [
        all_sum(x).tolist(),
        gather_objects(rank()),
        failures,
        on_main(lambda: 7),
        (doubled, seen),
    ]


def test_collectives_on_two_ranks() -> None:
    results = run_distributed(small_tools, 2)
    told = ["disk is full", "disk is full", "KeyError: 'key'", "KeyError: 'key'"]
    assert results[0] == [[1.0, 2.0], [0, 1], told, 7, (0, [0, 1])]
    assert results[1] == [[1.0, 2.0], [0, 1], told, 7, (2, [])]  # it has not seen the others' values


def sharded_names(min_unit_params: int) -> tuple[str, ...]:
    args = fsdp_args(min_unit_params=min_unit_params)
    with torch.device("meta"):
        model = Toy()
    return shard_model(model, UNITS, build_mesh(args, world_size(), "cpu"), args)


def test_small_units_join_the_unit_around_them() -> None:
    assert set(run_distributed(sharded_names, 1, 0)[0]) == {unit.fqn for unit in UNITS}
    # 20 parameters of the first layer join the tower: 56 together.
    assert set(run_distributed(sharded_names, 1, 40)[0]) == {"vit_model", "connector"}


def opaque_output() -> None:
    class Opaque(torch.nn.Linear):
        def forward(self, x: Tensor) -> object:  # type: ignore[override]
            return object()

    args = fsdp_args()
    model = Opaque(2, 2)
    shard_model(model, (), build_mesh(args, 1, "cpu"), args)
    model(torch.ones(1, 2))


def test_an_output_in_which_no_tensor_is_seen_is_refused() -> None:
    with pytest.raises(Exception, match="not in CARRIERS"):
        run_distributed(opaque_output, 1)


@pytest.mark.parametrize(
    ("strategy", "replicate", "shard", "ranks", "expected"),
    [
        ("FULL_SHARD", 1, 0, 8, (1, 8)),
        ("SHARD_GRAD_OP", 1, 8, 8, (1, 8)),
        ("NO_SHARD", 1, 0, 8, (8, 1)),
        ("HYBRID_SHARD", 1, 0, 8, (1, 8)),
        ("HYBRID_SHARD", 2, 0, 8, (2, 4)),
        ("HYBRID_SHARD", 2, 4, 8, (2, 4)),
        ("HYBRID_SHARD", 1, 8, 2, None),
        ("HYBRID_SHARD", 3, 0, 8, None),
        ("HYBRID_SHARD", 16, 0, 8, None),
        ("FULL_SHARD", 2, 4, 8, (1, 8)),  # with other strategies the two numbers mean nothing, as published
        ("SHARD_GRAD_OP", 1, 4, 8, (1, 8)),
        ("NO_SHARD", 4, 2, 8, (8, 1)),
    ],
)
def test_mesh_shape(
    strategy: str, replicate: int, shard: int, ranks: int, expected: tuple[int, int] | None
) -> None:
    args = fsdp_args(sharding_strategy=strategy, num_replicate=replicate, num_shard=shard)
    if expected is None:
        with pytest.raises(ValueError, match="--num_replicate"):
            mesh_shape(args, ranks)
    else:
        assert mesh_shape(args, ranks) == expected


def test_a_value_of_another_shape_is_refused() -> None:
    with torch.device("meta"):
        model = Toy()
    with pytest.raises(ValueError, match="connector.weight: the value has shape"):
        materialise(
            model,
            torch.device("cpu"),
            lambda n, s: torch.zeros(1) if n == "connector.weight" else starting_value(n, s),
        )
    assert not dist.is_initialized()
