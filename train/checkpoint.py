"""Training checkpoints that survive being killed at any instant, and where a run starts from.

`NNNNNNN/` holds `state/` (tensors of all ranks), `data.json` (step, lane cursors, accounts), `args.json` (every flag) and
`manifest.json` (size and hash of every other file). It is written as `NNNNNNN.tmp` and renamed when complete, so a directory with
that name is whole, and nothing in it is read before its hashes match.
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from train.args import CheckpointArgs
from train.distributed.collectives import barrier, gather_objects, on_main, rank, world_size
from train.distributed.dcp import load_tensors, save_tensors, stored_shapes
from train.files import describe_file, discard, sync_directory, write_json
from train.state import TrainState

logger = logging.getLogger(__name__)

STEP_NAME = re.compile(r"\d{7,}")
LEFTOVER_NAME = re.compile(r"\d{7,}\.(tmp|old)")
MANIFEST, DATA, ARGS, TENSORS = "manifest.json", "data.json", "args.json", "state"
PUBLISHED_WEIGHTS = (
    "model.safetensors",
    "ema.safetensors",
    "model.safetensors.index.json",
    "ema.safetensors.index.json",
)


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
    """

    def __init__(self, directory: Path, max_checkpoints: int, flags: Mapping[str, Any] | None = None):
        self.directory = directory
        self.max_checkpoints = max_checkpoints
        self.flags = dict(flags or {})

    def open(self, args: CheckpointArgs) -> Start | None:
        """Make sure that the run can write, and say what it starts from. To be called before anything heavy, on every rank.

        Returns:
            None if there is no checkpoint to start from: take `--model_path`.

        Raises:
            ValueError: on every rank, if the directory cannot be written, what was asked for is not there, or the run would mix
                its checkpoints with those of another.
        """
        return on_main(lambda: self._open(args))

    def save(self, state: TrainState) -> Path:
        """Write the present step; every rank must call.

        Returns:
            its directory.

        Raises:
            ValueError: on every rank, if it cannot be written; what was there before stays valid.
        """
        final = self.directory / f"{state.step:07d}"
        draft = final.with_name(final.name + ".tmp")
        on_main(lambda: self._begin(draft))
        save_tensors(draft / TENSORS, state.tensors())
        progress = state.progress()
        on_main(lambda: write_json(draft / DATA, progress))
        on_main(lambda: write_json(draft / ARGS, self.flags))
        barrier()
        files = _describe_files(draft, _files_in(draft))
        on_main(
            lambda: self._complete(
                draft, final, {"step": state.step, "world_size": world_size(), "files": files}
            )
        )
        logger.info("saved %s", final)
        return final

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
        for path in self.directory.iterdir():
            if LEFTOVER_NAME.fullmatch(path.name):  # of a run that was killed while it saved or deleted
                shutil.rmtree(path)
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

    def _begin(self, draft: Path) -> None:
        shutil.rmtree(draft, ignore_errors=True)
        (draft / TENSORS).mkdir(parents=True)

    def _complete(self, draft: Path, final: Path, manifest: Mapping[str, Any]) -> None:
        write_json(draft / MANIFEST, manifest)
        sync_directory(draft)
        if final.exists():  # only a damaged one: `open` refuses to run beside whole ones
            discard(final)
        os.rename(draft, final)
        sync_directory(self.directory)
        if self.max_checkpoints:
            # A damaged directory beyond this step must not count as one of the newest: it would push this one out.
            written = [path for path in self._steps() if int(path.name) <= manifest["step"]]
            for path in written[: -self.max_checkpoints]:
                discard(path)

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
    """Check every file of a step against its manifest; the ranks share the work, so every rank must call.

    Raises:
        ValueError: on every rank, naming the files that differ.
    """
    manifest = on_main(lambda: _read_manifest(path))
    if manifest is None:
        raise ValueError(f"{path}: is not a complete checkpoint; delete it to use the one before")
    expected = manifest["files"]
    found = _describe_files(path, sorted(expected))
    damaged = [name for name in sorted(expected) if found[name] != expected[name]]
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


def _averaged_names(path: Path) -> set[str]:
    return {name.removeprefix("ema.") for name in stored_shapes(path / TENSORS) if name.startswith("ema.")}


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
    return manifest if complete and {DATA, ARGS, f"{TENSORS}/.metadata"} <= sizes.keys() else None


def _files_in(path: Path) -> list[str]:
    return sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file())


def _describe_files(path: Path, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Size and hash of files by name; each rank reads its share."""
    own = {name: describe_file(path / name) for name in names[rank() :: world_size()]}
    return {name: entry for share in gather_objects(own) for name, entry in share.items()}
