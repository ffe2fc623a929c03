"""Validating while training: losses of held-out packs, and a few samples that the model answers and draws.

In: the groups under `val:` (or of `--val_dataset_config_file`). Out, each `--val_every` steps: figures named `val/…` for
TensorBoard, `val_log.jsonl` and whoever listens (keep-best); each `--val_samples_every`-th time, `samples/NNNNNNN/` with a sheet
per group and all answers.

The losses are computed by what trains: the same packer, layout, attention and losses (`train.loop.forward`), without gradient,
and without dropout of conditions. Which packs they are depends on the groups, the budget of a pack and `--val_steps` alone: the
same at every step, in every run and on any number of ranks. They are made once, when the run begins, and kept in memory. Sums and
counts are added over all ranks before the one division. A rank that has fewer packs takes part with empty ones.

The samples are continued on all ranks together, each token chosen by rank 0: every rank enters every sharded module as often as
the others.
"""

import functools
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from data.dataset_base import DropoutSpec
from data.loader import filler
from data.mixture import Group, GroupSpec, load_validation
from data.stream import LaneStream, StreamPlan, make_sample
from data.tokens import Tokenizer
from data.types import LaneCursor, PackedBatch, Reject, Sample
from modeling.bagel.choice import likeliest
from modeling.bagel.continuation import can_be_continued, continue_sample
from modeling.bagel.decode import Decoder, DrawOptions
from train.args import Args
from train.clock import VALIDATION
from train.distributed.collectives import all_sum, broadcast_object, gather_objects
from train.distributed.sharding import regather
from train.hooks import Hook
from train.loop import Run, forward
from train.report import Reporter, StepReport
from train.samples import Guard, Shown, sample_figures, sheet, shown
from train.state import TrainState

logger = logging.getLogger(__name__)

SEED = 0
"""Of the order, the noise and the timesteps of validation: not the run's, so that runs can be compared."""

SAMPLES_PER_LANE = 16
"""A group is read in so many lanes that each has at least as many records: few lanes make full packs."""

LOOKED_AT = 64
"""Records that are looked at for samples that can be shown."""

Listener = Callable[[int, Mapping[str, float]], None]
"""Told the step and the figures of every validation, on every rank: say, to keep the best checkpoint."""


class Validation(Hook):
    """Validates each `--val_every` steps and after the last one, also where that is the data's end.

    Args:
        run: objective, autoencoder and device of the training run.
        plan: of validation (`validation_plan`).
        tokenizer: of the model.
        reporter: takes figures and pictures.
        listeners: told the figures.

    Raises:
        ValueError: if too many records of a group cannot be used, or no pack comes of all of them.
    """

    def __init__(
        self,
        run: Run,
        plan: StreamPlan,
        tokenizer: Tokenizer,
        reporter: Reporter,
        listeners: Sequence[Listener] = (),
    ):
        args = run.args.validation
        self._run, self._plan, self._args, self._total_steps = run, plan, args, run.args.optim.total_steps
        self._tokenizer, self._reporter = tokenizer, reporter
        self._listeners = tuple(listeners)
        self._packs = own_packs(plan, args.val_steps, run.world.rank, run.world.size)
        self._rounds = {g: max(n) for g, n in _all_lengths(self._packs).items()}
        if not any(self._rounds.values()):
            raise ValueError(
                f"validation: no pack comes of the groups {', '.join(self._packs)}; look at their data"
            )
        self._samples = {g.name: fixed_samples(plan, g, args.val_samples) for g in plan.groups}
        self._guard = Guard()
        for figures in reporter.validations():  # of the run that is gone on with
            for group in self._samples:
                prefix = f"val/{group}/" if len(self._samples) > 1 else "val/"
                self._guard.judge(
                    group, {n.removeprefix(prefix): v for n, v in figures.items() if n.startswith(prefix)}
                )

    def after_step(self, state: TrainState, report: StepReport) -> None:
        is_last = state.step >= self._total_steps
        if is_last or state.step % self._args.val_every == 0:
            self._validate(state, is_last=is_last)

    def data_ended(self, state: TrainState) -> None:
        if state.step % self._args.val_every:  # else it has been done
            self._validate(state, is_last=True)

    def _validate(self, state: TrainState, *, is_last: bool) -> None:
        begun = time.perf_counter()
        with self._run.clock.phase(VALIDATION), self._weights(state):
            figures = self.losses(state)
            if self._shows(state.step, is_last=is_last):
                figures |= self.samples(state)
        figures["val/seconds"] = time.perf_counter() - begun
        self._run.clock.read()  # weights that were gathered here are no part of the next step's time
        self._reporter.validation(state.step, figures)
        for listener in self._listeners:
            listener(state.step, figures)

    def _shows(self, step: int, *, is_last: bool) -> bool:
        """Whether the validation after `step` updates has samples: the step alone decides, so a resumed run has the same."""
        every = self._args.val_samples_every
        return bool(every) and (is_last or step // self._args.val_every % every == 0)

    @contextmanager
    def _weights(self, state: TrainState) -> Iterator[None]:
        """The model as it is validated: in eval mode, without gradients, with the weights that the flag says."""
        state.model.eval()
        try:
            with torch.no_grad():
                if self._args.val_weights == "model":
                    yield
                else:
                    regather(state.model)
                    with state.ema.applied():
                        yield
        finally:
            regather(state.model)
            state.model.train()

    def losses(self, state: TrainState) -> dict[str, float]:
        """Means over all packs of all ranks; every rank must call.

        Returns:
            `val/loss`, `val/TERM`, and where there are several groups `val/GROUP/TERM`, for every term that was counted.
        """
        sums = {group: self._sums(state, group) for group in self._packs}
        names, weights = list(self._run.objective.weights), self._run.objective.weights
        figures: dict[str, float] = {}
        per_group = sums if len(sums) > 1 else {}
        for prefix, (totals, counts) in {
            "val/": (sum(t for t, _ in sums.values()), sum(c for _, c in sums.values())),
            **{f"val/{group}/": both for group, both in per_group.items()},
        }.items():
            means = {n: t / c for n, t, c in zip(names, totals.tolist(), counts.tolist(), strict=True) if c}  # type: ignore[union-attr]
            figures |= {f"{prefix}{name}": mean for name, mean in means.items()}
            figures[f"{prefix}loss"] = sum(weights[name] * mean for name, mean in means.items())
        return figures

    def _sums(self, state: TrainState, group: str) -> tuple[Tensor, Tensor]:
        """`k` float64 each: summed losses and counts of one group's packs, over all ranks."""
        world, objective = self._run.world, self._run.objective
        sums = torch.zeros(2, len(objective.weights), dtype=torch.float64)
        own = self._packs[group]
        for pack in [*own, *[filler(self._plan)] * (self._rounds[group] - len(own))]:
            terms = forward(self._run, state.model, pack.to(world.device))
            sums[0] += torch.stack([t.total.detach() for t in terms]).double().cpu()
            sums[1] += objective.counts(pack)
        totals, counts = all_sum(sums)
        return totals, counts

    def samples(self, state: TrainState) -> dict[str, float]:
        """Continue the samples and write their sheets; every rank must call.

        Returns:
            `val/FIGURE` of `train.samples.sample_figures`, and where there are several groups `val/GROUP/FIGURE`.
        """
        run, args = self._run, self._args
        decoder = Decoder(state.model, run.encoder, self._plan.layout, self._plan.special, run.world.device)  # type: ignore[arg-type]
        options = DrawOptions(num_timesteps=args.val_num_timesteps, cfg_text_scale=args.val_cfg_text_scale)
        rows: dict[str, list[Shown]] = {}
        for group, samples in self._samples.items():
            rows[group] = []
            for number, sample in enumerate(samples):
                made = continue_sample(
                    decoder,
                    sample,
                    options,
                    seed=number,
                    max_new_tokens=args.val_max_new_tokens,
                    choose=_by_main,
                )
                rows[group].append(
                    shown(sample, made, functools.partial(self._tokenizer.decode, keep_special=True))
                )
        own = {group: sample_figures(of_group) for group, of_group in rows.items()}
        for group, figures in own.items():
            self._warn(state.step, group, figures)
        self._show(state.step, {group: of_group for group, of_group in rows.items() if of_group})
        together = sample_figures([row for of_group in rows.values() for row in of_group])
        per_group = own if len(own) > 1 else {}
        return {
            **{f"val/{name}": value for name, value in together.items()},
            **{
                f"val/{group}/{name}": value
                for group, figures in per_group.items()
                for name, value in figures.items()
            },
        }

    def _warn(self, step: int, group: str, figures: Mapping[str, float]) -> None:
        wrong = self._guard.judge(group, figures)
        if wrong and self._run.world.is_main:
            logger.warning("step %d: pictures drawn for %r look wrong: %s", step, group, "; ".join(wrong))

    def _show(self, step: int, rows: Mapping[str, list[Shown]]) -> None:
        if not self._run.world.is_main or not rows:
            return
        folder = Path(self._run.args.checkpoint.results_dir) / "samples" / f"{step:07d}"
        folder.mkdir(parents=True, exist_ok=True)
        for group, of_group in rows.items():
            page = sheet(of_group)
            self._reporter.image(step, f"val/{group}", page)
            Image.fromarray(page).save(folder / (re.sub(r"[^\w.-]", "_", group) + ".png"))
        answers = {group: [row.to_json() for row in of_group] for group, of_group in rows.items()}
        (folder / "answers.json").write_text(
            json.dumps(answers, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


def validation_specs(args: Args) -> tuple[GroupSpec, ...]:
    """The groups that the flags say to validate on; none: no validation.

    Raises:
        ValueError: if validation is asked for and there is nothing to validate on.
    """
    asked, file = args.validation.enable_validation, args.validation.val_dataset_config_file
    if asked is False:
        return ()
    specs = load_validation(file or args.data.dataset_config_file, separate=file is not None)
    if asked and not specs:
        raise ValueError(
            f"--enable_validation True: {args.data.dataset_config_file} has no 'val:' with groups; add it, or name a file of "
            "them with --val_dataset_config_file"
        )
    return specs


def validation_plan(plan: StreamPlan, groups: tuple[Group, ...]) -> StreamPlan:
    """The training plan with the groups of validation: the same packs whatever the run's seed, and no condition left out."""
    return replace(plan, groups=groups, seed=SEED, dropout=DropoutSpec(text=0, vit=0, vae=0))


def own_packs(plan: StreamPlan, total: int, rank: int, world_size: int) -> dict[str, list[PackedBatch]]:
    """This rank's packs of every group; those of all ranks are the same for any number of them.

    Args:
        plan: of validation. Every pack holds samples of one group.
        total: packs of all groups and ranks, shared out by weight; each group has one at least.
        rank, world_size: whose packs.

    Raises:
        ValueError: if too many records of a group cannot be used.
    """
    packs: dict[str, list[PackedBatch]] = {}
    weights = sum(g.weight for g in plan.groups) or 1.0
    dealt = 0
    for group in plan.groups:
        quota = max(1, round(total * group.weight / weights))
        lanes = max(1, min(quota, len(group.source) // SAMPLES_PER_LANE))
        of_group = replace(plan, groups=(replace(group, weight=1.0),), num_lanes=lanes)
        packs[group.name] = []
        for lane in range(lanes):
            # The first lanes have one pack more where the quota does not divide.
            share = quota // lanes + (lane < quota % lanes)
            if (dealt + lane) % world_size == rank:
                packs[group.name] += _lane_packs(of_group, lane, share)
        dealt += lanes
    return packs


def _lane_packs(plan: StreamPlan, lane: int, count: int) -> list[PackedBatch]:
    stream = LaneStream(plan, LaneCursor(lane=lane))
    packs: list[PackedBatch] = []
    while len(packs) < count and not stream.has_ended:
        pack = stream.next_pack()
        if pack.rejects:
            first = pack.rejects[0].message
            logger.warning("validation: %d records cannot be used; first: %s", len(pack.rejects), first)
        if pack.origins:
            packs.append(pack)
    return packs


def fixed_samples(plan: StreamPlan, group: Group, count: int) -> list[Sample]:
    """The first samples of a group that can be continued."""
    alone = replace(plan, num_lanes=1)
    found: list[Sample] = []
    for position in range(min(LOOKED_AT, len(group.source))):
        if len(found) == count:
            break
        made = make_sample(alone, group, lane=0, position=position)
        if not isinstance(made, Reject) and can_be_continued(made):
            found.append(made)
    return found


def _all_lengths(packs: Mapping[str, Sequence[PackedBatch]]) -> dict[str, list[int]]:
    """By group, how many packs every rank has."""
    lengths = gather_objects({group: len(own) for group, own in packs.items()})
    return {group: [of_rank[group] for of_rank in lengths] for group in packs}


def _by_main(logits: Tensor, alive: Sequence[int]) -> Tensor:
    """The likeliest ids as rank 0 sees them: rounding must not part the ranks."""
    return torch.tensor(broadcast_object(likeliest(logits, alive).tolist()), dtype=torch.int64)
