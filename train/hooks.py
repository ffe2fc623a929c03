"""What a run does beside training: validating, looking at gradients, profiling. The loop calls every hook and knows none.

A hook is an object made in `train/main.py` and put into `Run.hooks`. All of its methods are called on every rank, in the order of
the row, so a hook may use collectives as long as every rank does.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor

from data.types import PackedBatch
from modeling.types import LossTerm
from train.report import StepReport
from train.state import TrainState


class Hook:
    """Does nothing; a hook overrides what it needs."""

    def before_step(self, state: TrainState) -> None:
        """A step is about to begin; `state.step` updates are done."""

    def asks(self) -> bool:
        """Whether something has happened on this rank that every rank has to act on.

        Asked in every step: the answer rides along with the step's counts, so it costs no collective.
        """
        return False

    def heard(self, state: TrainState) -> None:
        """At least one rank asked, and nothing of this step has been done. To end the run, raise: every rank is here."""

    def before_backward(self, state: TrainState, terms: Sequence[LossTerm], divisor: Tensor) -> None:
        """A pack's losses are there, with their graph; `divisor` `k` is what each will be divided by."""

    def after_pack(self, pack: PackedBatch, totals: Tensor, amounts: Tensor) -> None:
        """A pack's gradient is there: what every sample adds to every loss and to its count, `k s` float64 on the CPU each."""

    def before_update(self, state: TrainState) -> None:
        """The step's whole gradient is there, summed over ranks, neither clipped nor looked at."""

    def after_step(self, state: TrainState, report: StepReport) -> None:
        """A step is done and reported, and not yet saved."""

    def data_ended(self, state: TrainState) -> None:
        """The data has ended before `--total_steps`: the step before was the last, and is not saved yet."""

    def close(self) -> None:
        """The run ends, well or badly."""


@contextmanager
def closing_all(hooks: Sequence[Hook]) -> Iterator[Sequence[Hook]]:
    """Close all of them when the block ends, the last first."""
    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(hook.close)
        yield hooks
