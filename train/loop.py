"""The one training loop. In: a sharded model with its state, endless packs. Out: steps, reports, checkpoints."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from data.ledger import (
    Account,
    accounts,
    count_trained,
    format_accounts,
    format_lost,
    format_shares,
    require_few_rejects,
    scalars,
)
from data.sources import DataStops
from data.types import PackedBatch, Reject
from modeling.bagel.latents import LatentEncoder
from modeling.types import LossTerm
from train import nonfinite
from train.args import Args
from train.checkpoint import Checkpoints
from train.clock import BACKWARD, COMMUNICATION, DATA, FORWARD, OPTIMIZER, Clock
from train.distributed.collectives import all_sum, gather_objects
from train.distributed.session import Stopped, World
from train.distributed.sharding import grad_norm, sync_gradients
from train.hooks import Hook
from train.journal import REJECTS_PATTERN
from train.objective import Objective, by_sample, divisors
from train.optim import clip_factor, set_learning_rates, trained_parameters
from train.report import Reporter, StepReport
from train.state import TrainState

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What does not change while training.

    Attributes:
        args: all flags.
        world: this rank's place.
        objective: losses and weights.
        encoder: pictures to latents.
        journal: notes what this rank trained on in a step.
        group_sizes: records per group of the mixture, for the limit on rejects.
        flops: operations that training on a pack needs.
        peak_tflops: what one device can do; 0 if that is not known.
        clock: where the time of a step goes.
        hooks: what is done beside training (train/hooks.py).
    """

    args: Args
    world: World
    objective: Objective
    encoder: LatentEncoder
    journal: Callable[[int, list[PackedBatch]], None]
    group_sizes: Mapping[str, int]
    flops: Callable[[PackedBatch], float]
    peak_tflops: float
    clock: Clock = field(default_factory=Clock)
    hooks: Sequence[Hook] = ()


def train(
    run: Run, state: TrainState, batches: Iterator[PackedBatch], checkpoints: Checkpoints, reporter: Reporter
) -> None:
    """Train up to `--total_steps`.

    Raises:
        nonfinite.NotFinite: on every rank, if a loss or the gradient is not finite; what has been trained before is saved.
        DataStops: on every rank, if a file of the data vanished or changed, a data worker hangs, or too many records cannot be
            used; what has been trained is saved.
        Stopped: on every rank, if any of them was asked to end (`--auto_resume` goes on); what has been trained is saved.
    """
    total, every, first = run.args.optim.total_steps, run.args.checkpoint.save_every, state.step
    while state.step < total:
        for hook in run.hooks:
            hook.before_step(state)
        try:
            report = training_step(run, state, batches)
        except (DataStops, Stopped, nonfinite.NotFinite):
            if state.step > first and state.step % every:
                checkpoints.save(state)
            checkpoints.finish()
            raise
        if report is None:
            reporter.note(f"the data has ended (when_exhausted): stopping after step {state.step} of {total}")
            if state.step > first:
                _end_early(run, state, checkpoints)
            break
        reporter.step(report)
        for hook in run.hooks:
            hook.after_step(state, report)
        if state.step % run.args.train.log_every == 0 or state.step == total:
            ledger = check_accounts(run, state)
            reporter.note(format_accounts(ledger))
            reporter.note(format_shares(ledger, state.demands))
            reporter.scalars(state.step, scalars(ledger, state.demands))
        if state.step % every == 0 or state.step == total:
            checkpoints.save(state)
    checkpoints.finish()
    if lost := format_lost(check_accounts(run, state)):
        reporter.note(lost)


def _end_early(run: Run, state: TrainState, checkpoints: Checkpoints) -> None:
    for hook in run.hooks:
        hook.data_ended(state)
    if state.step % run.args.checkpoint.save_every:
        checkpoints.save(state)


def training_step(run: Run, state: TrainState, batches: Iterator[PackedBatch]) -> StepReport | None:
    """One optimizer update: all ranks, all micro-batches.

    Returns:
        None, on every rank, if all lanes have ended: nothing was done.

    Raises:
        DataStops: on every rank, if one of them has no more usable data: nothing was done, or all of the step.
        Stopped: likewise, if one of them was asked to end.
        nonfinite.NotFinite: likewise, if a loss or the gradient is not finite (with `skip`, again and again): weights, optimizer
            and account are as before the step.
    """
    started = time.perf_counter()
    accumulation = run.args.train.gradient_accumulation_steps
    with run.clock.phase(DATA):
        packs, lost = _next_packs(batches, accumulation)
    trained = [count_trained(p) for p in packs]
    packs = [p.to(run.world.device) for p in packs]
    # Counted before any backward: each loss is divided once, by what the whole step has of it.
    no_counts = torch.zeros(len(run.objective.weights), dtype=torch.float64)
    own = torch.stack([run.objective.counts(p) for p in packs] + [no_counts] * (accumulation - len(packs)))
    extra = [
        sum(p.num_tokens for p in packs),
        sum(len(p.origins) for p in packs),
        sum(len(p.rejects) for p in packs),
        sum(run.flops(p) for p in packs),
        sum(not p.is_filler for p in packs),
        lost is not None,
        *(hook.asks() for hook in run.hooks),
    ]
    with run.clock.phase(COMMUNICATION):
        everywhere = all_sum(torch.cat([own.flatten(), own.new_tensor(extra)]))
    per_pack = everywhere[: own.numel()].view_as(own)
    tokens, samples, rejects, flops, num_packs, num_lost, *asked = everywhere[own.numel() :].tolist()
    if num_lost:
        first = next(filter(None, gather_objects("" if lost is None else str(lost))))
        raise (DataStops if lost is None else type(lost))(first) from lost
    for hook, num_asked in zip(run.hooks, asked, strict=True):
        if num_asked:
            hook.heard(state)
    if not num_packs:
        return None
    counts, divisor = per_pack.sum(0).tolist(), divisors(per_pack, run.args.loss.loss_divisor)

    each: list[Tensor] = []
    for i, pack in enumerate(packs):
        sync_gradients(state.model, run.args.fsdp, last=i == accumulation - 1)
        each.append(_forward_backward(run, state, pack, divisor[i]))
    parameters = trained_parameters(state.optimizer)
    state.loss_scale.unscale(parameters)
    for hook in run.hooks:
        hook.before_update(state)
    with run.clock.phase(OPTIMIZER):
        norm = grad_norm(parameters)
    loss_scale = state.loss_scale.value
    outcome = _judge(run, state, packs, each, norm)
    with run.clock.phase(OPTIMIZER):
        lr = set_learning_rates(state.optimizer, state.step, run.args.optim)
        if outcome.is_update:
            state.ema.release()
            state.optimizer.step(factor=clip_factor(float(norm), run.args.optim.max_grad_norm))
            state.ema.update(state.step)
        state.optimizer.zero_grad(set_to_none=True)

    state.step += 1
    state.packs_consumed += int(num_packs)
    for i, (pack, amounts) in enumerate(zip(packs, trained, strict=True)):
        if pack.is_filler:
            continue
        if outcome.skipped:
            state.write_off(pack.cursor, outcome.written_off[i])
        else:
            state.consume(pack.cursor, amounts)
    _write_rejects(run, state.step, [*(r for p in packs for r in p.rejects), *chain(*outcome.written_off)])
    run.journal(state.step, packs)
    if rejects or outcome.skipped:
        check_accounts(run, state)
    means = run.objective.means(outcome.totals, counts)
    return StepReport(
        step=state.step,
        loss=math.nan if outcome.skipped else sum(run.objective.weights[n] * m for n, m in means.items()),
        losses={} if outcome.skipped else means,
        counts={} if outcome.skipped else dict(zip(run.objective.weights, counts, strict=True)),
        lr=lr,
        total_norm=float(norm),
        loss_scale=loss_scale,
        tokens=int(tokens),
        samples=int(samples),
        seconds=time.perf_counter() - started,
        flops=flops,
        peak_tflops=run.peak_tflops * run.world.size,
        memory_mib=_memory(run.world.device),
        phases=run.clock.read(),
    )


def _next_packs(batches: Iterator[PackedBatch], count: int) -> tuple[list[PackedBatch], DataStops | None]:
    """This rank's next packs, or fewer and why: the other ranks have to hear of it before anybody stops."""
    packs: list[PackedBatch] = []
    while len(packs) < count:
        try:
            packs.append(next(batches))
        except DataStops as error:
            return packs, error
    return packs, None


def check_accounts(run: Run, state: TrainState) -> dict[str, Account]:
    """The account of every group over all ranks; every rank must call.

    Raises:
        ValueError: if the law does not hold.
        TooManyRejects: if too many records were rejected.
    """
    now = accounts(state.all_cursors(), state.all_trained(), state.all_written_off())
    require_few_rejects(now, run.group_sizes, run.args.data.max_reject_fraction)
    return now


def forward(run: Run, model: nn.Module, pack: PackedBatch) -> tuple[LossTerm, ...]:
    """Every loss of one pack, summed: what training differentiates and validation reports."""
    flow = run.encoder(pack)
    return run.objective.terms(model(pack, flow.noised), pack, flow)


def _forward_backward(run: Run, state: TrainState, pack: PackedBatch, divisor: Tensor) -> Tensor:
    """Add one pack's gradient; returns what every sample adds to every loss, `k s` float64 on the CPU."""
    with run.clock.phase(FORWARD):
        terms = forward(run, state.model, pack)
        loss = run.objective.scalar(terms, divisor)
    for hook in run.hooks:
        hook.before_backward(state, terms, divisor)
    with run.clock.phase(BACKWARD):
        (loss * state.loss_scale.value).backward()
    totals, amounts = by_sample(terms, pack)
    for hook in run.hooks:
        hook.after_pack(pack, totals, amounts)
    return totals


@dataclass(frozen=True, slots=True, kw_only=True)
class _Outcome:
    """What becomes of a step.

    Attributes:
        totals: `k` float64, the losses summed over ranks.
        is_update: whether the weights are to change.
        skipped: a loss or the gradient is not finite, which is not fp16's doing; `written_off` then has the samples per pack.
    """

    totals: Tensor
    is_update: bool = True
    skipped: bool = False
    written_off: Sequence[Sequence[Reject]] = ()


def _judge(
    run: Run, state: TrainState, packs: Sequence[PackedBatch], each: Sequence[Tensor], norm: Tensor
) -> _Outcome:
    """Whether losses and gradient are finite, on every rank, and what to do if they are not (train/nonfinite.py).

    Raises:
        nonfinite.NotFinite: with `--on_nonfinite stop`, naming losses and samples; with `skip`, if it happens again and again.
    """
    names, step = list(run.objective.weights), state.step + 1
    own = (
        torch.stack([x.sum(1) for x in each]).sum(0) if each else torch.zeros(len(names), dtype=torch.float64)
    )
    with run.clock.phase(COMMUNICATION):
        totals = all_sum(own)
    if totals.isfinite().all():
        before = state.loss_scale.value
        if state.loss_scale.overflowed(norm):
            if run.world.is_main:
                logger.warning(
                    "step %d: gradients overflow with a loss scale of %g: the weights stay as they are, the scale is %g now",
                    step,
                    before,
                    state.loss_scale.value,
                )
            return _Outcome(totals=totals, is_update=False)
        if norm.isfinite():
            state.skipped_in_a_row = 0
            return _Outcome(totals=totals)
    blamed = [nonfinite.blame(names, x) for x in each]
    mine = [line for pack, bad in zip(packs, blamed, strict=True) for line in nonfinite.tell(pack, bad)]
    if mine:
        results = Path(run.args.checkpoint.results_dir)
        mine.append(f"kept in {nonfinite.keep_packs(results, step, run.world.rank, packs, blamed)}")
    places = [f"rank {rank}: {'; '.join(lines)}" for rank, lines in enumerate(gather_objects(mine)) if lines]
    cause = (
        "; ".join(places)
        or f"losses are finite, the gradient's norm is {float(norm)}; lower --lr or --max_grad_norm"
    )
    if run.args.train.on_nonfinite == "stop":
        raise nonfinite.NotFinite(
            f"step {step} is not finite: {cause}; mend or remove the samples, or go on without the step: --on_nonfinite skip"
        )
    state.skipped_in_a_row += 1
    if state.skipped_in_a_row > nonfinite.MAX_IN_A_ROW:
        raise nonfinite.NotFinite(
            f"step {step} is not finite, nor were the {nonfinite.MAX_IN_A_ROW} before it, so --on_nonfinite skip does not help: "
            f"{cause}"
        )
    if run.world.is_main:
        logger.warning("step %d is not finite and changes nothing: %s", step, cause)
    written_off = [nonfinite.write_off(pack, bad) for pack, bad in zip(packs, blamed, strict=True)]
    return _Outcome(totals=totals, is_update=False, skipped=True, written_off=written_off)


def _write_rejects(run: Run, step: int, rejects: Sequence[Reject]) -> None:
    """Append this rank's unusable records to `rejects.RANK.jsonl`, and say so."""
    rows = [{"step": step, **asdict(r)} for r in rejects]
    if rows:
        path = Path(run.args.checkpoint.results_dir) / REJECTS_PATTERN.replace("*", str(run.world.rank))
        with path.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        logger.warning("%d records could not be used, see %s; first: %s", len(rows), path, rows[0]["message"])


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        # Kibibytes on Linux, bytes on a Mac.
        unit = 1 if sys.platform == "darwin" else 2**10
        return {"mem_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20}
    peak = {
        "mem_allocated": torch.cuda.max_memory_allocated(device),
        "mem_cache": torch.cuda.max_memory_reserved(device),
    }
    return {name: value / 2**20 for name, value in peak.items()}
