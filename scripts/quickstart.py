"""The whole quickstart: data, autoencoder, training, evaluation, report. `make demo` calls it.

Out, under --output_dir: data/, base/ (the untrained model), checkpoints/, results_dir/ (log, trained model), logs/ (of stages),
statistics.json, results.jsonl, timings.json, summary.csv and report.html. Started again after a kill it goes on: a finished
stage whose commands and configuration are the same is left out, an interrupted one is continued.

    python scripts/quickstart.py --output_dir runs/quickstart --seed 0 --nproc 2
"""

import argparse
import ctypes
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from inference_pipeline.figures import figure_lines  # noqa: E402 (needs the path above)

SETUP_SECONDS = "WEFT_SETUP_SECONDS"
"""Environment variable that holds how long making the environment took, if somebody measured it."""

LAST_LINES = 25


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One timed part of the run.

    Attributes:
        name: key of timings.json.
        steps: done one after the other; the commands of one step run at the same time. `{...}` is filled in from `places`.
        reads: files of the repository that decide what comes out; when one changes, there is another quickstart to make.
        writes: what it makes, under --output_dir.
        again: whether results of other settings are simply made again; the other stages refuse to touch them.
    """

    name: str
    steps: tuple[tuple[str, ...], ...]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    again: bool = False


SMOKE: Mapping[str, str] = {
    "data": "--train_scenes 60 --val_scenes 4 --test_scenes 4",
    "autoencoder": "--total_steps 10",
    "vision_tower": "--total_steps 10",
    "training": "--total_steps 8 --warmup_steps 2 --save_every 4 --log_every 2",
}
"""What --smoke adds to the stages: everything is done, nothing is learnt."""

EVALUATE = (
    "{python} -m inference_pipeline.evaluate --model_path {run}/results_dir/model --model_id quickstart-seed{seed} "
    "--data_dir {run}/data --output_dir {run} --seed {seed} --timestep_shift 5 "
    "--cfg_text_scale 2 --cfg_interval 0.4 1.0 --edit_cfg_text_scale 1"
)


def stages(nproc: int) -> tuple[Stage, ...]:
    """The run, in order."""
    return (
        Stage(
            name="data",
            steps=(
                (
                    "{python} scripts/data/make_quickstart.py --output_dir {run}/data --seed {seed} --workers {workers} "
                    "{small_data}",
                ),
                (
                    "{python} scripts/data/make_quickstart_model.py --data_dir {run}/data --output_dir {run}/base",
                ),
            ),
            reads=(
                "scripts/data/make_quickstart.py",
                "scripts/data/quickstart_scenes.py",
                "scripts/data/make_quickstart_model.py",
            ),
            writes=("data", "base"),
        ),
        Stage(
            name="autoencoder",
            steps=(
                (
                    "{torchrun} train/main_autoencoder.py --image_dir {run}/data/train/images "
                    "--val_dir {run}/data/val/images --output_dir {run}/base --seed {seed} {small_autoencoder}",
                ),
            ),
            reads=("train/main_autoencoder.py", "modeling/autoencoder.py"),
            writes=("base/ae.safetensors", "base/ae_config.json", "base/ae_log.jsonl"),
        ),
        Stage(
            name="vision_tower",
            steps=(
                (
                    "{torchrun} train/main_siglip.py --coco_path {run}/data/refer_train.json "
                    "--val_coco_path {run}/data/refer_val.json --data_dir {run}/data --output_dir {run}/base "
                    "--seed {seed} {small_vision_tower}",
                ),
            ),
            reads=("train/main_siglip.py",),
            writes=("base/vit_model.safetensors", "base/vit_log.jsonl"),
        ),
        Stage(
            name="training",
            steps=(
                (
                    "{torchrun} train/main.py --config configs/quickstart_run.yaml "
                    "--dataset_config_file configs/quickstart.yaml --model_path {run}/base --vit_path {run}/base "
                    "--results_dir {run}/results_dir --checkpoint_dir {run}/checkpoints "
                    "--global_seed {seed} --auto_resume True {small_training}",
                ),
            ),
            reads=("configs/quickstart_run.yaml", "configs/quickstart.yaml"),
            writes=("results_dir", "checkpoints"),
        ),
        Stage(
            name="evaluation",
            steps=(
                tuple(f"{EVALUATE} --num_shards {nproc} --shard {shard}" for shard in range(nproc)),
                (f"{EVALUATE} --merge",),
            ),
            reads=(
                "inference_pipeline/questions.py",
                "inference_pipeline/scoring.py",
                "train/metrics/digits.py",
            ),
            writes=("results*.jsonl", "images", "statistics.json", "evaluation_settings.json"),
            again=True,
        ),
    )


REPORT = Stage(
    name="report",
    steps=(
        ("{python} -m inference_pipeline.parse_statistics_to_csv -d {run} -o {run}/summary.csv",),
        ("{python} -m inference_pipeline.report --run_dir {run} --output {run}/report.html",),
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run every stage that is not done, print the table; the failing command's exit code if one fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--nproc", type=int, default=2, help="processes for training and evaluation")
    parser.add_argument(
        "--smoke", action="store_true", help="a minute's walk through all stages, to see them work"
    )
    args = parser.parse_args(argv)
    if args.nproc < 1:
        parser.error(f"--nproc must be at least 1, not {args.nproc}")
    run = args.output_dir.resolve()
    python = shlex.quote(sys.executable)
    places = {
        "run": shlex.quote(str(run)),
        "seed": str(args.seed),
        "nproc": str(args.nproc),
        "workers": str(args.nproc),
        "python": python,
        **{f"small_{stage}": flags if args.smoke else "" for stage, flags in SMOKE.items()},
        "torchrun": f"{python} -m torch.distributed.run --standalone --nproc_per_node={args.nproc}",
    }
    try:
        with only_one(run):
            seconds = run_stages(stages(args.nproc), run, places)
            write_json(run / "timings.json", {"stages": seconds})
            perform(REPORT, run, places, Clock(run / "logs" / "report.started"))
    except StageFailed as failure:
        print(failure, file=sys.stderr)
        return failure.code
    except NotOurs as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(
            f"error: {error.filename or run}: {error.strerror or error}; choose another --output_dir",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"\nstopped; the same command goes on from here ({run})", file=sys.stderr)
        return 130
    print_summary(run, seconds)
    return 0


# ------------------------------------------------------------------------------------------------------------ the stages


class StageFailed(Exception):
    """A command ended with an error: its code, and what a person needs to find out why."""

    def __init__(self, stage: str, command: str, code: int, log: Path, tail: Sequence[str]):
        shown = "".join(f"  | {line}\n" for line in tail)
        super().__init__(f"\n{stage} failed with exit code {code}: {command}\n{shown}whole log: {log}")
        self.code = code if 0 < code < 256 else 1


class NotOurs(Exception):
    """The directory holds something that this run would have to overwrite."""


def run_stages(todo: Sequence[Stage], run: Path, places: Mapping[str, str]) -> dict[str, float]:
    """Do what is not done; seconds by stage, those of earlier starts of the same work included.

    Raises:
        NotOurs: if a stage's results are there already, and are not of this work.
    """
    (run / "logs").mkdir(parents=True, exist_ok=True)
    seconds = {"setup": float(os.environ[SETUP_SECONDS])} if os.environ.get(SETUP_SECONDS) else {}
    before = ""
    for number, stage in enumerate(todo):
        # A stage is the same work if its commands, its configuration and everything before it are the same.
        before = fingerprint(stage, places, before)
        done, started = run / "logs" / f"{stage.name}.done", run / "logs" / f"{stage.name}.started"
        title = f"[{number + 1}/{len(todo)}] {stage.name}"
        if read_json(done).get("fingerprint") == before:
            seconds[stage.name] = read_json(done)["seconds"]
            print(f"\n== {title}: done before ==", flush=True)
            continue
        going_on = read_json(started).get("fingerprint") == before
        print(f"\n== {title}{': goes on' if going_on else ''} ==", flush=True)
        if not going_on:
            make_room(run, stage, ours=done.is_file() or started.is_file())
            done.unlink(missing_ok=True)
            write_json(started, {"fingerprint": before, "seconds": 0.0})
        clock = Clock(started)
        perform(stage, run, places, clock)
        seconds[stage.name] = clock.total()
        write_json(done, {"fingerprint": before, "seconds": seconds[stage.name]})
        started.unlink()
    return seconds


def fingerprint(stage: Stage, places: Mapping[str, str], before: str) -> str:
    """Of a stage's commands, configuration files and the stages before it."""
    # How many processes make the data changes nothing about the data.
    commands = [command.format(**{**places, "workers": ""}) for step in stage.steps for command in step]
    read = [(ROOT / name).read_text(encoding="utf-8") for name in stage.reads]
    return hashlib.sha256(json.dumps([before, commands, read]).encode()).hexdigest()


def make_room(run: Path, stage: Stage, *, ours: bool) -> None:
    """See that a stage that starts afresh overwrites nothing.

    Raises:
        NotOurs: if what it writes is there, unless an earlier run of ours made it and it is quickly made again.
    """
    there = sorted(path for pattern in stage.writes for path in run.glob(pattern))
    if there and not ours:
        raise NotOurs(
            f"{there[0]} is there and was not made by this program; choose another --output_dir (make: RUN=...)"
        )
    if there and not stage.again:
        raise NotOurs(
            f"{there[0]} was made by a quickstart with other settings or of another version; remove {run}, or choose another "
            "--output_dir (make: RUN=...)"
        )
    for path in there:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Clock:
    """How long a stage has worked, kept in its `.started` file so that a killed start still counts."""

    def __init__(self, file: Path):
        self._file, self._state = file, read_json(file)
        self._start = self._saved = time.monotonic()

    def total(self) -> float:
        return round(self._state.get("seconds", 0.0) + time.monotonic() - self._start, 1)

    def save(self) -> None:
        """Note the time so far, every few seconds."""
        if self._state and time.monotonic() - self._saved > 5:
            self._saved = time.monotonic()
            write_json(self._file, {**self._state, "seconds": self.total()})


def perform(stage: Stage, run: Path, places: Mapping[str, str], clock: Clock) -> None:
    """Run a stage's commands; every line goes to the terminal and to the stage's log.

    Raises:
        StageFailed: as soon as one command fails; the others of its step are stopped.
    """
    path = run / "logs" / f"{stage.name}.log"
    with path.open("a", encoding="utf-8") as log:
        for step in stage.steps:
            commands = [command.format(**places) for command in step]
            for command in commands:
                log.write(f"$ {command}\n")
            log.flush()
            workers = [Worker(command, log, run) for command in commands]
            try:
                while any(worker.code is None for worker in workers) and not any(
                    worker.code for worker in workers
                ):
                    time.sleep(0.1)
                    clock.save()
            finally:
                for worker in workers:
                    worker.stop()
            for worker in workers:
                if worker.failed:
                    raise StageFailed(stage.name, worker.command, worker.failed, path, worker.tail)


class Worker:
    """One running command, whose lines a thread copies to the terminal and the log."""

    def __init__(self, command: str, log: IO[str], run: Path):
        self.command = command
        self.tail: deque[str] = deque(maxlen=LAST_LINES)
        self.failed = 0
        self._process = subprocess.Popen(
            shlex.split(command),
            cwd=ROOT,
            env={
                "OMP_NUM_THREADS": "1",
                **os.environ,
                "PYTHONUNBUFFERED": "1",
                "WEFT_DATA": str(run / "data"),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )
        self._copier = threading.Thread(target=self._copy, args=(log,), daemon=True)
        self._copier.start()

    @property
    def code(self) -> int | None:
        """Exit code, None while it runs."""
        code = self._process.poll()
        self.failed = code or 0
        return code

    def stop(self) -> None:
        """Wait for a finished command's last lines; end a running one, gently first, and do not count that as its failure."""
        if self.code is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._copier.join(timeout=10)

    def _copy(self, log: IO[str]) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as lines:
            for line in lines:
                self.tail.append(line.rstrip("\n"))
                log.write(line)
                log.flush()
                print(line, end="", flush=True)


def _die_with_parent() -> None:
    """Linux: the child gets SIGTERM when this program is killed, so that no orphan goes on training."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)


# ------------------------------------------------------------------------------------------------------------- the files


@contextmanager
def only_one(run: Path) -> Iterator[None]:
    """Hold the directory: two quickstarts in one would overwrite each other's files."""
    run.mkdir(parents=True, exist_ok=True)
    with (run / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(0, "another quickstart is running in this directory", str(run)) from None
        yield


def read_json(path: Path) -> dict[str, Any]:
    """A small state file; empty if it is absent or was cut short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return content if isinstance(content, dict) else {}


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a state file in one go."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


def print_summary(run: Path, seconds: Mapping[str, float]) -> None:
    """The figures, the times and where to look."""
    print(f"\n{'stage':<20}{'time':>10}")
    for name, value in (*seconds.items(), ("together", sum(seconds.values()))):
        print(f"{name:<20}{int(value) // 60:>6}:{int(value) % 60:02d}")
    print("", *figure_lines(read_json(run / "statistics.json")), sep="\n")
    print(f"\n{run / 'summary.csv'}\n{run / 'report.html'}")


if __name__ == "__main__":
    sys.exit(main())
