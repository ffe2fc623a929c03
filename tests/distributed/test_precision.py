"""fp16: an overflow on one rank leaves out the step on all, and a checkpoint knows the scale. What is frozen has no gradients."""

import logging
from pathlib import Path

import pytest
import torch

from modeling.bagel.bagel import Bagel
from modeling.bagel.shard_plan import shard_plan
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.test_modalities import Collectives
from tests.distributed.tiny_run import EVERYTHING, FIXED, build_state, made_pack, make_run
from tests.unit.modeling.tiny import tiny_config
from train.checkpoint import Checkpoints
from train.config import build_args
from train.distributed.collectives import rank
from train.distributed.sharding import local
from train.distributed.units import units
from train.loop import training_step
from train.loss_scale import LARGEST, LossScale, precision_lines
from train.param_manager import freeze
from train.report import StepReport

FP16 = {**FIXED, "param_dtype": "fp16", "sharding_strategy": "FULL_SHARD", "loss_scale": 2.0**22}


def scale(**flags: object) -> LossScale:
    return LossScale.build(build_args({**FP16, **flags}).fsdp)


def test_the_scale_halves_grows_and_stays_where_it_is_not_needed() -> None:
    inf, one = torch.tensor(torch.inf), torch.tensor(1.0)
    found = scale(loss_scale=8, loss_scale_growth=2)
    assert found.overflowed(inf) and found.value == 4
    assert not found.overflowed(one) and found.value == 4
    assert not found.overflowed(one) and found.value == 8
    assert not found.overflowed(one) and found.overflowed(torch.tensor(torch.nan)) and found.value == 4
    assert not found.overflowed(one) and found.value == 4  # counted from the overflow on
    resumed = scale()
    resumed.load(found.to_json())
    assert (resumed.value, resumed.clean_steps) == (4, 1)
    assert found.overflowed(inf) and found.overflowed(inf) and found.value == 1
    assert not found.overflowed(inf)  # with a scale of 1 it is no overflow but a gradient that is not finite
    largest = scale(loss_scale=LARGEST, loss_scale_growth=1)
    assert not largest.overflowed(one) and largest.value == LARGEST
    constant = scale(loss_scale=8, loss_scale_growth=0)
    assert not any(constant.overflowed(one) for _ in range(5)) and constant.value == 8
    for dtype in ("bf16", "fp32"):
        without = scale(param_dtype=dtype)
        assert without.value == 1 and not without.overflowed(inf) and without.value == 1
        without.load(found.to_json())
        assert without.value == 1
    resumed.load(without.to_json())  # of a run in bf16
    assert resumed.value == 4


def test_a_gpu_without_bf16_is_spoken_of(monkeypatch: pytest.MonkeyPatch) -> None:
    fsdp, half = build_args({}).fsdp, build_args(FP16).fsdp
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    assert "--param_dtype fp16" in precision_lines(fsdp, "cuda")[0]
    assert precision_lines(fsdp, "cpu") == precision_lines(half, "cuda") == []
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert precision_lines(fsdp, "cuda") == []


def steps_in_fp16(folder: str) -> tuple[list[StepReport], list[bool], float, float, str]:
    """Reports; whether each step changed the weights; the scale after, and after a restart; what the log says."""

    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("train.loop").addHandler(handler)
    args = build_args({**FP16, "checkpoint_dir": folder, "auto_resume": True})
    state, run = build_state(args, sharded=True), make_run(args, tiny_config())
    reports, changed = [], []
    for _ in range(12):
        before = full_tensors((n, p.detach().clone()) for n, p in state.model.named_parameters())
        # Rank 0 alone would not overflow as early as rank 1 does.
        report = training_step(run, state, iter([made_pack(("say",) if rank() == 0 else EVERYTHING, rank())]))
        assert report is not None
        after = full_tensors((n, p.detach()) for n, p in state.model.named_parameters())
        reports.append(report)
        changed.append(any(not torch.equal(before[n], x) for n, x in after.items()))
    checkpoints = Checkpoints.build(args.checkpoint, args.flat(), 60)
    checkpoints.open(args.checkpoint)
    checkpoints.save(state)
    checkpoints.finish()
    again = build_state(args, sharded=True)
    start = checkpoints.open(args.checkpoint)
    assert start is not None
    checkpoints.restore(again, start)
    return reports, changed, state.loss_scale.value, again.loss_scale.value, "\n".join(lines)


@pytest.mark.timeout(200)
def test_an_overflow_leaves_out_the_step_on_all_ranks(tmp_path: Path) -> None:
    (reports, changed, value, resumed, said), (others, *_, other_value, other_resumed, nothing) = (
        run_distributed(steps_in_fp16, 2, str(tmp_path))
    )
    left_out = [not torch.isfinite(torch.tensor(report.total_norm)).item() for report in reports]
    assert left_out[0] and 1 <= sum(left_out) <= 10
    assert changed == [not is_left_out for is_left_out in left_out]
    assert [report.loss_scale for report in reports] == [report.loss_scale for report in others]
    assert value == resumed == other_value == other_resumed == 2.0**22 / 2 ** sum(left_out)
    assert said.count("gradients overflow with a loss scale of") == sum(left_out) and not nothing
    assert reports[0].log_entry()["total_norm"] is None and reports[0].log_entry()["loss_scale"] == 2.0**22
    assert reports[-1].loss < reports[0].loss


def gradients_of_a_frozen_tower(flags: dict[str, object]) -> tuple[set[str], int, int, int]:
    """Names with a gradient; elements of this rank's gradients; how often, and how many elements are summed over ranks."""
    args = build_args({**FIXED, **flags})
    state, run = build_state(args, sharded=True), make_run(args, tiny_config())
    held: dict[str, int] = {}

    def look(*_: object) -> None:
        held.update(
            {n: local(p.grad).numel() for n, p in state.model.named_parameters() if p.grad is not None}
        )

    state.optimizer.register_step_pre_hook(look)
    with Collectives() as collectives:
        training_step(run, state, iter([made_pack(EVERYTHING, rank())]))
    summed = [size for name, size in collectives.seen if "reduce_scatter" in name]
    return set(held), sum(held.values()), len(summed), sum(summed)


def test_what_is_frozen_has_no_gradient_and_sends_none() -> None:
    flags = {
        "sharding_strategy": "FULL_SHARD",
        "min_unit_params": 0,
        "freeze_vit": True,
        "freeze_mot_und": True,
    }
    args = build_args({**FIXED, **flags})
    with torch.device("meta"):
        model = Bagel(tiny_config())
    freeze(model, args.params)
    trained = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert 0 < sum(trained.values()) < 0.8 * sum(p.numel() for p in model.parameters())
    ranks = run_distributed(gradients_of_a_frozen_tower, 2, flags)
    names, _, times, _ = ranks[0]
    assert names == set(trained)
    assert times == sum(unit.trained > 0 for unit in units(model, shard_plan(model.config), args.fsdp))
    total = sum(trained.values())
    assert sum(held for _, held, *_ in ranks) == total
    assert all(
        elements <= total / 2 + 200 for *_, elements in ranks
    )  # a rank's half, padded parameter by parameter
