"""Training checkpoints that survive being killed at any instant, and where a run starts from.

`NNNNNNN/` holds `state/` (tensors of all ranks), `data.json` (step, lane cursors, accounts, generators), `args.json` (every flag)
and `manifest.json` (size of every other file, hash of every JSON file, figures of the step). It is written as `NNNNNNN.tmp` and
renamed when complete, so a directory with that name is whole; what is read of it has to be what was written.

Weights change only when the optimizer steps. So a thread copies every rank's share aside during the next forward and backward,
and writes it while training goes on: training waits only if the copy is not ready then (`release`). What goes wrong there is
known to all ranks, and raised by the next step, the next save or the end of the run.
"""

import json
import logging
import math
import os
import re
import shutil
import socket
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train.args import CheckpointArgs
from train.distributed.collectives import (
    Group,
    ask_main,
    background_group,
    gather_objects,
    on_main,
    rank,
    world_size,
)
from train.distributed.dcp import (
    INDEX,
    Piece,
    Saver,
    StoredTensors,
    load_tensors,
    write_index,
    write_pieces,
)
from train.files import describe_file, discard, put_in_place, sync_directory, write_json
from train.hooks import Hook
from train.report import StepReport
from train.state import TrainState
from train.streams import present

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"\d{7,}")
LEFTOVER_NAME = re.compile(r"\d{7,}\.(tmp|old|weft_old)")
SHARED_WITHIN_S = 60.0
"""So long a network's file system may take to show a new file to other nodes."""
MANIFEST, DATA, ARGS, TENSORS, BEST = "manifest.json", "data.json", "args.json", "state", "best.json"
PUBLISHED_WEIGHTS = (
    "model.safetensors",
    "ema.safetensors",
    "model.safetensors.index.json",
    "ema.safetensors.index.json",
)

Beside = Callable[[TrainState], Callable[[Path], None]]
"""What is to stand in a step's directory besides: taken from the state on every rank, written into the draft on rank 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run starts from, if not from `--model_path`.

    Attributes:
        path: a step's directory of ours, or (`published`) a directory with safetensors weights.
        weights_only: take the weights and begin at step 0.
        from_ema: with `weights_only`, take the averaged weights.
        published: the caller has to load the weights by `--model_path`'s rules.
        moments: take the optimizer's moments along; else they start from zero.
    """

    path: Path
    weights_only: bool = False
    from_ema: bool = False
    published: bool = False
    moments: bool = True


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where the steps' directories stand.
        max_checkpoints: newest ones to keep, 0 for all.
        flags: every flag by name, stored with each checkpoint.
        asynchronous: write in a thread; else `save` returns when everything is on the disk.
        keep_best: figure (see `note`) whose best step is kept besides the newest ones.
        best_is_highest: of that figure; else the lowest is the best.
        timeout_s: how long the writing threads of the ranks wait for each other.

    Attributes:
        beside: what is to stand in a step's directory besides; nothing unless it is set.
    """

    def __init__(
        self,
        directory: Path,
        max_checkpoints: int,
        flags: Mapping[str, Any] | None = None,
        *,
        asynchronous: bool = False,
        keep_best: str | None = None,
        best_is_highest: bool = False,
        timeout_s: float = 600.0,
    ):
        self.directory = directory
        self.max_checkpoints = max_checkpoints
        self.flags = dict(flags or {})
        self.asynchronous = asynchronous
        self.keep_best = keep_best
        self.best_is_highest = best_is_highest
        self.timeout_s = timeout_s
        self.release_later = False
        self.beside: Beside = lambda state: lambda draft: None
        self._saver = Saver(aside=asynchronous)
        self._group: Group | None = None
        self._writing: _Background | None = None
        self._figures: dict[str, list[float]] = defaultdict(list)

    @staticmethod
    def build(args: CheckpointArgs, flags: Mapping[str, Any], timeout_s: float) -> "Checkpoints":
        """As the flags say."""
        return Checkpoints(
            args.directory,
            args.max_checkpoints,
            flags,
            asynchronous=args.async_checkpoint,
            keep_best=args.keep_best,
            best_is_highest=args.keep_best_mode == "max",
            timeout_s=timeout_s,
        )

    def open(self, args: CheckpointArgs) -> Start | None:
        """Make sure that the run can write, and say what it starts from. To be called before anything heavy, on every rank.

        Returns:
            None if there is no checkpoint to start from: take `--model_path`.

        Raises:
            ValueError: on every rank, if the directory cannot be written or is not the same one for every rank, what was asked
                for is not there, or the run would mix its checkpoints with those of another.
        """
        start = on_main(lambda: self._open(args))
        self._require_shared()
        self._open_group()
        return start

    def note(self, figures: Mapping[str, float]) -> None:
        """Say how good the model is at present: losses of the step, or what validation found.

        The next checkpoint bears, of what was noted since the one before, the mean over the steps, and the newest of what
        validation found (`val/…`), which is nearest to the weights that are saved. Only finite values count, and rank 0's.
        """
        for name, value in figures.items():
            if name.startswith("val/"):
                self._figures.pop(name, None)
            if math.isfinite(value):
                self._figures[name].append(float(value))

    def save(self, state: TrainState) -> Path:
        """Write the present step; every rank must call. Waits for the save before.

        If `asynchronous` and `release_later`, the caller has to call `release` before anything changes the state.

        Returns:
            its directory; if `asynchronous`, it will stand there when `finish` has returned.

        Raises:
            ValueError: on every rank, if this one or the one before cannot be written; what was there before stays valid.
        """
        self.finish()
        tensors, progress, now = state.tensors(), state.progress(), present()
        self._open_group()
        figures = {name: sum(values) / len(values) for name, values in self._figures.items()}
        self._figures.clear()
        step, final = state.step, self.directory / f"{state.step:07d}"
        beside = self.beside(state)
        copied = threading.Event()

        def take() -> list[tuple[Piece, Tensor]]:
            try:
                return self._saver.take(tensors, self._group, now)
            finally:
                copied.set()

        self._writing = _Background(lambda: self._write(final, step, take, progress, figures, beside), copied)
        if self.asynchronous:
            self._writing.start()
            if not self.release_later:
                self.release()
        else:
            self._writing.run()
            self.finish()
        return final

    def release(self) -> None:
        """Wait until the tensors may change again: what is being saved has been copied aside, or could not be."""
        if self._writing is not None:
            self._writing.copied.wait()

    @property
    def failed(self) -> bool:
        """Whether the save in the background has ended badly on this rank; `finish` raises what happened."""
        return self._writing is not None and self._writing.error is not None

    def finish(self) -> None:
        """Wait for the save in the background, if there is one; every rank must call.

        Raises:
            ValueError: on every rank, if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.finish()

    def latest(self) -> Path | None:
        """The newest complete step; half-written and foreign directories do not count. Looks at sizes, not yet at hashes."""
        return next(reversed(complete_steps(self.directory)), None)

    def restore(self, state: TrainState, start: Start) -> None:
        """Put a checkpoint of ours into the state, on any number of ranks; every rank must call.

        Raises:
            ValueError: if a file is damaged, or the checkpoint is of another model.
        """
        assert not start.published, "published weights are loaded by the model's own loader"
        require_intact(start.path)
        if start.weights_only:
            load_weights(state, start.path, from_ema=start.from_ema)
            logger.info("took the %s weights of %s", "averaged" if start.from_ema else "last", start.path)
            return
        load_tensors(start.path / TENSORS, state.tensors(moments=start.moments))
        state.load_progress(json.loads((start.path / DATA).read_text(encoding="utf-8")))
        logger.info("continuing from %s", start.path)
        self._tell_changes(start.path)

    def _open(self, args: CheckpointArgs) -> Start | None:
        self._require_writable()
        for path in self.directory.glob(
            "*.weft_old"
        ):  # put aside by a run that was killed before the new one stood there
            if LEFTOVER_NAME.fullmatch(path.name) and not path.with_suffix("").exists():
                os.rename(path, path.with_suffix(""))
        start = self._choose_start(args)
        done = 0
        if start is not None and not start.weights_only:
            done = int(start.path.name)
        later = [
            path.name for path in self._steps() if int(path.name) > done and _read_manifest(path) is not None
        ]
        if later:
            advice = (
                "continue it with --auto_resume"
                if start is None
                else "resume from the newest, or move the later ones away"
            )
            raise ValueError(
                f"{self.directory}: holds checkpoints of an earlier run up to step {int(later[-1])}; {advice}, or choose another "
                "--results_dir or --checkpoint_dir"
            )
        for path in self.directory.iterdir():
            if LEFTOVER_NAME.fullmatch(path.name):  # of a run that was killed while it saved or deleted
                shutil.rmtree(path)
        return start

    def _choose_start(self, args: CheckpointArgs) -> Start | None:
        newest = self.latest()
        if args.auto_resume and newest is not None:
            return Start(path=newest, moments=args.resume_model_optimizer)
        if args.resume_from is None:
            return None
        path = Path(args.resume_from)
        if not path.is_dir():
            raise ValueError(f"--resume_from {path}: there is no such directory")
        if any((path / name).is_file() for name in PUBLISHED_WEIGHTS):
            if not args.resume_model_only:
                logger.info(
                    "--resume_from %s: holds weights only, so step, optimizer and data start afresh", path
                )
            return Start(path=path, weights_only=True, from_ema=args.finetune_from_ema, published=True)
        step = path if STEP_NAME.fullmatch(path.name) else Checkpoints(path, 0).latest()
        if step is None or _read_manifest(step) is None:
            raise ValueError(
                f"--resume_from {path}: holds no complete checkpoint (a step's directory with {MANIFEST})"
            )
        if args.finetune_from_ema and not args.resume_model_only:
            raise ValueError(
                f"--finetune_from_ema with --resume_from {path} needs --resume_model_only: continuing a run takes both kinds of "
                "weights"
            )
        return Start(
            path=step,
            weights_only=args.resume_model_only,
            from_ema=args.finetune_from_ema,
            moments=args.resume_model_optimizer,
        )

    def _require_writable(self) -> None:
        probe = self.directory / f".write_test_{os.getpid()}"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise ValueError(
                f"{self.directory}: cannot write here ({error.strerror}); choose another --results_dir or --checkpoint_dir"
            ) from error

    def _require_shared(self) -> None:
        """Every rank writes its share into the same directory; on several nodes that takes a file system they share."""
        if world_size() == 1:
            return
        probe = self.directory / on_main(self._leave_probe)
        until = time.monotonic() + SHARED_WITHIN_S
        while not (is_seen := os.path.exists(probe)) and time.monotonic() < until:
            time.sleep(0.1)
        places = gather_objects("" if is_seen else f"rank {rank()} on {socket.gethostname()}")
        on_main(probe.unlink)
        if blind := [place for place in places if place]:
            others = f" and {len(blind) - 1} more" if blind[1:] else ""
            raise ValueError(
                f"{self.directory}: what rank 0 writes there is not seen by {blind[0]}{others}; "
                "--results_dir (or --checkpoint_dir) has to be on a file system that all nodes share"
            )

    def _leave_probe(self) -> str:
        name = f".shared_test_{os.getpid()}_{time.time_ns()}"
        (self.directory / name).touch()
        return name

    def _open_group(self) -> None:
        """For the writing threads. Made when the run begins: what a node cannot open shows then, not hours later."""
        if self.asynchronous and self._group is None:
            self._group = background_group(self.timeout_s)

    def _write(
        self,
        final: Path,
        step: int,
        take: Callable[[], Sequence[tuple[Piece, Tensor]]],
        progress: Mapping[str, Any],
        figures: Mapping[str, float],
        beside: Callable[[Path], None],
    ) -> None:
        """All of a save. It may run in a thread, so it talks over a group of its own."""
        draft = final.with_name(final.name + ".tmp")
        share: Sequence[tuple[Piece, Tensor]] = ()
        pieces: list[Piece] = []
        failure = ""
        try:
            share = take()
        except Exception as error:  # noqa: BLE001 - the other ranks wait for this one: it has to tell them
            advice = "; --async_checkpoint False saves without a copy" if self.asynchronous else ""
            failure = (
                f"{draft}: rank {rank()} cannot copy its share aside: {type(error).__name__}: {error}{advice}"
            )
        on_main(lambda: _begin(draft), self._group)
        try:
            if share:
                pieces = write_pieces(draft / TENSORS, share, f"{rank()}.safetensors")
        except OSError as error:
            failure = f"{draft}: rank {rank()} cannot write: {error.strerror}"
        manifest = {"step": step, "world_size": world_size(), "figures": figures}

        def complete(shares: Sequence[tuple[Sequence[Piece], str]]) -> Sequence[None]:
            if failures := [line for _, line in shares if line]:
                raise ValueError(failures[0])
            everything = [piece for pieces, _ in shares for piece in pieces]
            self._complete(draft, final, everything, progress, manifest, beside)
            return [None] * len(shares)

        ask_main((pieces, failure), complete, self._group)

    def _complete(
        self,
        draft: Path,
        final: Path,
        pieces: Sequence[Piece],
        progress: Mapping[str, Any],
        manifest: Mapping[str, Any],
        beside: Callable[[Path], None],
    ) -> None:
        beside(draft)
        write_index(draft / TENSORS, pieces)
        write_json(draft / DATA, progress)
        write_json(draft / ARGS, self.flags)
        sync_directory(draft / TENSORS)
        write_json(draft / MANIFEST, {**manifest, "files": _describe_files(draft)})
        sync_directory(draft)
        put_in_place(draft, final)
        logger.info("saved %s", final)
        best = self._best(manifest["figures"])
        if self.max_checkpoints:
            # A damaged directory beyond this step must not count as one of the newest: it would push this one out.
            written = [path for path in self._steps() if int(path.name) <= manifest["step"]]
            for path in written[: -self.max_checkpoints]:
                if path != best:
                    discard(path)

    def _best(self, present: Mapping[str, float]) -> Path | None:
        """The step with the best figure so far, of those that are still there."""
        if self.keep_best is None:
            return None
        if self.keep_best not in present:
            there = ", ".join(sorted(present)) or "none"
            logger.warning(
                "--keep_best %s: no such figure since the checkpoint before; there were: %s",
                self.keep_best,
                there,
            )
        figures: dict[Path, float] = {}
        for path in self._steps():
            manifest = _read_manifest(path)
            value = None if manifest is None else manifest.get("figures", {}).get(self.keep_best)
            if value is not None and math.isfinite(value):
                figures[path] = value
        if not figures:
            return None
        sign = -1 if self.best_is_highest else 1
        best = min(figures, key=lambda path: sign * figures[path])  # the earliest, of equals
        write_json(self.directory / "best.json.tmp", {"step": int(best.name), self.keep_best: figures[best]})
        os.replace(self.directory / "best.json.tmp", self.directory / BEST)
        logger.info("best %s so far: %g, in %s", self.keep_best, figures[best], best)
        return best

    def _steps(self) -> list[Path]:
        return _steps_in(self.directory)

    def _tell_changes(self, path: Path) -> None:
        before = json.loads((path / ARGS).read_text(encoding="utf-8"))
        for name, value in self.flags.items():
            if name in before and before[name] != value:
                logger.info(
                    "--%s is %s now, it was %s when the checkpoint was written", name, value, before[name]
                )


def complete_steps(directory: Path) -> list[Path]:
    """The complete steps' directories, the newest last. Looks at sizes, not at hashes."""
    return [path for path in _steps_in(directory) if _read_manifest(path) is not None]


def load_weights(state: TrainState, path: Path, *, from_ema: bool) -> None:
    """Put only a step's weights into the model, and start the average from them; every rank must call.

    Parameters without an average (they were frozen) are taken as they were.
    """
    weights = state.weights()
    load_tensors(path / TENSORS, weights)
    if from_ema:
        trained = _averaged_names(path)
        load_tensors(path / TENSORS, {f"ema.{n}": x for n, x in _unprefixed(weights).items() if n in trained})
    state.ema.reset()


def require_intact(path: Path) -> None:
    """Check a step's JSON files against its manifest, and the sizes of the others; every rank must call.

    The tensors' own checksums stand in the index, which is one of those files: they are checked when they are read.

    Raises:
        ValueError: on every rank, naming the files that differ.
    """
    on_main(lambda: _require_intact(path))


def _require_intact(path: Path) -> None:
    manifest = _read_manifest(path)
    if manifest is None:
        raise ValueError(f"{path}: is not a complete checkpoint; delete it to use the one before")
    damaged = [
        name
        for name, entry in sorted(manifest["files"].items())
        if "sha256" in entry and describe_file(path / name) != entry
    ]
    if damaged:
        raise ValueError(
            f"{path}: {', '.join(damaged)} changed since it was written; delete {path.name} to use the one before"
        )


def _steps_in(directory: Path) -> list[Path]:
    """Every directory with the name of a step, complete or not, in order."""
    if not directory.is_dir():
        return []
    steps = [path for path in directory.iterdir() if STEP_NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name))


def _begin(draft: Path) -> None:
    shutil.rmtree(draft, ignore_errors=True)
    (draft / TENSORS).mkdir(parents=True)


def _averaged_names(path: Path) -> set[str]:
    names = StoredTensors(path / TENSORS).shapes
    return {name.removeprefix("ema.") for name in names if name.startswith("ema.")}


def _unprefixed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): x for name, x in weights.items()}


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete step, None if it is not one."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
        complete = all((path / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if complete and {DATA, ARGS, f"{TENSORS}/{INDEX}"} <= sizes.keys() else None


def _describe_files(path: Path) -> dict[str, dict[str, Any]]:
    """Every file's size, and the hash of those that have no checksums inside, by name."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return {
        str(file.relative_to(path)): describe_file(file)
        if file.suffix == ".json"
        else {"bytes": file.stat().st_size}
        for file in files
    }


class _Background:
    """Something done in a thread, whose failure is kept for whoever waits."""

    def __init__(self, action: Callable[[], None], copied: threading.Event):
        self._action = action
        self.copied = copied
        self._thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)
        self.error: BaseException | None = None

    def start(self) -> None:
        self._thread.start()

    def run(self) -> None:
        try:
            self._action()
        except BaseException as error:  # noqa: BLE001 - whatever it is, the training thread has to hear of it
            self.error = error
        finally:
            self.copied.set()

    def finish(self) -> None:
        """Wait; raise what went wrong."""
        if self._thread.ident is not None:
            self._thread.join()
        if self.error is not None:
            raise self.error


class SaveInBackground(Hook):
    """Between steps: a save that failed stops every rank; the losses of the steps are figures to choose checkpoints by."""

    def __init__(self, checkpoints: Checkpoints):
        self.checkpoints = checkpoints
        checkpoints.release_later = True

    def before_update(self, state: TrainState) -> None:
        self.checkpoints.release()

    def asks(self) -> bool:
        return self.checkpoints.failed

    def heard(self, state: TrainState) -> None:
        self.checkpoints.finish()

    def after_step(self, state: TrainState, report: StepReport) -> None:
        counted = {name: mean for name, mean in report.losses.items() if report.counts.get(name)}
        self.checkpoints.note({"loss": report.loss, **counted})

    def close(self) -> None:
        """What is being written gets its end, also where the run has not ended well; that is the error to tell then."""
        try:
            self.checkpoints.finish()
        except Exception as error:  # noqa: BLE001 - see above
            logger.warning("the last checkpoint was not written: %s", error)
