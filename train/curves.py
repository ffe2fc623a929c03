"""Losses looked at closer: by group and by task, and how much each of them moves the trunk.

Each goes to TensorBoard and, as one line, to `curves.jsonl` in `--results_dir`. Source of the idea: weights of losses that were
tuned blind over three orders of magnitude.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from data.types import PackedBatch
from modeling.types import LossTerm
from train.distributed.collectives import all_sum, gather_objects
from train.distributed.sharding import extra_backward
from train.hooks import Hook
from train.objective import Objective
from train.report import Reporter, StepReport
from train.state import TrainState

Sums = dict[str, tuple[float, float]]
"""`group/NAME/LOSS` or `task/NAME/LOSS` -> total and count."""


class LossesBySource(Hook):
    """Mean of every loss over the samples of each group (`group/NAME/LOSS`) and task (`task/NAME/LOSS`), every so many steps.

    The means are over all that was trained on since the last ones, on all ranks; a skipped step is not among it.
    """

    def __init__(self, reporter: Reporter, objective: Objective, every: int, total_steps: int):
        self._reporter, self._names = reporter, tuple(objective.weights)
        self._every, self._total_steps = every, total_steps
        self._sums: Sums = {}
        self._step: Sums = {}

    def after_pack(self, pack: PackedBatch, totals: Tensor, amounts: Tensor) -> None:
        for sample, (origin, task) in enumerate(zip(pack.origins, pack.tasks, strict=True)):
            sources = [f"group/{origin.group}", *([f"task/{task}"] if task else [])]
            rows = zip(self._names, totals[:, sample].tolist(), amounts[:, sample].tolist(), strict=True)
            for loss, total, amount in rows:
                for source in sources:
                    _add(self._step, f"{source}/{loss}", total, amount)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if report.losses:
            for name, (total, count) in self._step.items():
                _add(self._sums, name, total, count)
        self._step = {}
        if report.step % self._every == 0 or report.step == self._total_steps:
            self._write(report.step)

    def data_ended(self, state: TrainState) -> None:
        if state.step % self._every:
            self._write(state.step)

    def _write(self, step: int) -> None:
        everywhere: Sums = {}
        for sums in gather_objects(self._sums):
            for name, (total, count) in sums.items():
                _add(everywhere, name, total, count)
        self._sums = {}
        self._reporter.curves(step, {n: t / c for n, (t, c) in sorted(everywhere.items()) if c})


def _add(sums: Sums, name: str, total: float, count: float) -> None:
    before = sums.get(name, (0.0, 0.0))
    sums[name] = (before[0] + total, before[1] + count)


class GradientShares(Hook):
    """Every so many steps, `grad_trunk/LOSS`: L2 norm of the weighted loss's gradient in the trunk's last states, before the
    final norm; and `grad_share/LOSS`: its part of the sum of these norms.

    One more backward pass per loss, from the loss to the trunk's end: through heads and output layers, not through the trunk.
    Gradients of the parameters are not touched.
    """

    def __init__(self, model: nn.Module, reporter: Reporter, objective: Objective, every: int):
        self._reporter, self._objective, self._every = reporter, objective, every
        self._squares = torch.zeros(len(objective.weights), dtype=torch.float64)
        self._states: list[Tensor] = []
        self._on = False
        trunk = model.get_submodule("language_model.model")
        norms = [m for name, m in trunk.named_children() if name in ("norm", "norm_moe_gen")]
        self._handles = [m.register_forward_pre_hook(self._see) for m in norms]

    def before_step(self, state: TrainState) -> None:
        self._on = (state.step + 1) % self._every == 0
        self._states = []

    def before_backward(self, state: TrainState, terms: Sequence[LossTerm], divisor: Tensor) -> None:
        if not self._on:
            return
        states, self._states = self._states, []
        scale = state.loss_scale.value
        with extra_backward(state.model):
            for i, term in enumerate(terms):
                loss = scale * self._objective.scalar((term,), divisor[i : i + 1])
                if loss.requires_grad and states:
                    found = torch.autograd.grad(loss, states, retain_graph=True, allow_unused=True)
                    squares = [g.double().square().sum() / scale**2 for g in found if g is not None]
                    self._squares[i] += sum(float(s) for s in squares)

    def after_step(self, state: TrainState, report: StepReport) -> None:
        if not self._on:
            return
        norms = dict(zip(self._objective.weights, all_sum(self._squares).sqrt().tolist(), strict=True))
        self._on, self._squares = False, torch.zeros_like(self._squares)
        self._reporter.curves(report.step, gradient_figures(norms))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self._on and torch.is_grad_enabled() and args[0].requires_grad:
            self._states.append(args[0])


def gradient_figures(norms: Mapping[str, float]) -> dict[str, float]:
    """Norm and share of every loss that has a gradient; no shares of a step that is not finite."""
    total = sum(norms.values())
    return {
        **{f"grad_trunk/{name}": norm for name, norm in norms.items()},
        **{f"grad_share/{name}": norm / total for name, norm in norms.items() if total > 0},
    }
