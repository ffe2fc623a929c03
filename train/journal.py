"""Writes the journal: which samples every pack of every step was made of (`data/journal.py` says how, `data/replay.py` why)."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from data.journal import PATTERN, journal_name, plan_line, step_line
from data.mixture import GroupSpec
from data.stream import StreamPlan
from data.tokens import Tokenizer
from data.types import PackedBatch
from train.distributed.collectives import on_main
from train.distributed.session import World
from train.files import reopen_log

REJECTS_PATTERN = "rejects.*.jsonl"
"""Of the files, one per rank, that name the records that could not be used, with the step that came next."""


class Journal:
    """This rank's file.

    Every rank must create one: what earlier runs wrote beyond `steps_done`, on any number of ranks, is dropped, also of rejected
    records: they come again.

    Args:
        directory: `--results_dir`.
        world: this rank's place.
        steps_done: where the run begins or goes on.
        plan, specs, tokenizer: what the packs depend on.

    Raises:
        ValueError: on every rank, if the directory cannot be written.
    """

    def __init__(
        self,
        directory: Path,
        world: World,
        *,
        steps_done: int,
        plan: StreamPlan,
        specs: Sequence[GroupSpec],
        tokenizer: Tokenizer,
    ):
        on_main(lambda: _drop_later_lines(directory, steps_done))
        self._file = (directory / journal_name(world.rank)).open("a", encoding="utf-8")
        if world.is_main:
            self._write(plan_line(steps_done, plan, specs, tokenizer))

    def step(self, step: int, batches: Iterable[PackedBatch]) -> None:
        """Note what this rank trained on in a step."""
        self._write(step_line(step, batches))

    def close(self) -> None:
        self._file.close()

    def _write(self, line: str) -> None:
        self._file.write(line + "\n")
        self._file.flush()


def _drop_later_lines(directory: Path, steps_done: int) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for path in (*directory.glob(PATTERN), *directory.glob(REJECTS_PATTERN)):
            reopen_log(path, steps_done).close()
    except OSError as error:
        raise ValueError(
            f"{directory}: cannot write here ({error.strerror}); choose another --results_dir"
        ) from error
