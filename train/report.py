"""What a run tells, in `--results_dir` and from rank 0: a line to follow, `train_log.jsonl`, `log.txt`, TensorBoard files.

In: one `StepReport` per step. `train_log.jsonl` has every step's own values; progress lines and TensorBoard have means over
`--log_every` steps.
"""

import itertools
import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray

from modeling.optional import require
from train.args import TrainArgs
from train.files import reopen_log

logger = logging.getLogger(__name__)

LOG_FILE, VALIDATION_FILE, CURVES_FILE, TEXT_FILE, TENSORBOARD_DIR = (
    "train_log.jsonl", "val_log.jsonl", "curves.jsonl", "log.txt", "tensorboard",
)  # fmt: skip
COUNT_TAGS = {"ce": "total_ce_tokens", "mse": "total_mse_tokens"}
"""Published names of the terms' counts; other terms' are `total_<term>`."""
RECENT_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step, over all ranks and micro-batches: the only thing that loggers see.

    Attributes:
        step: updates done, this one included.
        loss: weighted total; not finite where the step was skipped for that (`--on_nonfinite skip`), and `losses` are empty then.
        losses: mean of each term.
        counts: what each term was divided by.
        lr: by parameter group, as used in this step.
        total_norm: of the gradients, before clipping; not finite where fp16 gradients overflowed and nothing was updated.
        tokens, samples: trained on.
        seconds: of wall time.
        flops: operations that the step needs.
        peak_tflops: what all devices together can do; 0 if that is not known.
        memory_mib: highest on this rank so far: `mem_allocated`, `mem_cache` of its accelerator, or `mem_rss` of the process.
        phases: seconds of rank 0's step by phase (train/clock.py).
        loss_scale: what the loss was multiplied with (train/loss_scale.py).
    """

    step: int
    loss: float
    losses: Mapping[str, float]
    counts: Mapping[str, float]
    lr: Mapping[str, float]
    total_norm: float
    tokens: int
    samples: int
    seconds: float
    flops: float = 0.0
    peak_tflops: float = 0.0
    memory_mib: Mapping[str, float] = field(default_factory=dict)
    phases: Mapping[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0

    @property
    def top_lr(self) -> float:
        """Learning rate of the fastest group."""
        return max(self.lr.values())

    def log_entry(self) -> dict[str, Any]:
        """A line of `train_log.jsonl`."""
        return {
            "step": self.step,
            "loss": self.loss if math.isfinite(self.loss) else None,
            **{
                name: mean for name, mean in self.losses.items() if self.counts.get(name)
            },  # no value where none was counted
            "lr": self.top_lr,
            "total_norm": self.total_norm if math.isfinite(self.total_norm) else None,
            **({"loss_scale": self.loss_scale} if self.loss_scale != 1.0 else {}),
            "tokens_per_sec": round(self.tokens / self.seconds, 1),
            "samples_per_sec": round(self.samples / self.seconds, 2),
            "phases": {name: round(seconds, 4) for name, seconds in self.phases.items()},
            **{name: round(mib, 1) for name, mib in self.memory_mib.items()},
            "time": round(time.time(), 3),
        }


class Reporter:
    """Writes reports; on ranks other than 0 it does nothing.

    Args:
        directory: `--results_dir`.
        first_step: updates done before; what an earlier run logged beyond it is dropped.
        total_steps, log_every: of the run.
        tensorboard: whether to write TensorBoard files.
        wandb: starts a run on Weights & Biases (`wandb_starter`); None: none.
        is_main: whether this rank writes.
    """

    def __init__(
        self,
        directory: Path,
        *,
        first_step: int,
        total_steps: int,
        log_every: int,
        tensorboard: bool,
        is_main: bool,
        wandb: Callable[[], Any] | None = None,
    ):
        self.total_steps = total_steps
        self.log_every = log_every
        self.is_main = is_main
        self._directory, self._first_step = directory, first_step
        self._files: dict[str, TextIO] = {}
        self._window: list[StepReport] = []
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        if not is_main:
            return
        try:
            directory.mkdir(parents=True, exist_ok=True)
            kept = _set_aside(directory) if first_step == 0 else []
            self._log = reopen_log(directory / LOG_FILE, first_step)
            self._handler = logging.FileHandler(directory / TEXT_FILE, encoding="utf-8")
        except OSError as error:
            raise ValueError(
                f"{directory}: cannot write here ({error.strerror}); choose another --results_dir"
            ) from error
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        logging.getLogger().addHandler(self._handler)
        if kept:
            logger.warning(
                "%s holds the log of an earlier run, and this one begins anew: kept as %s",
                directory,
                ", ".join(kept),
            )
        self._board = _open_board(directory / TENSORBOARD_DIR, first_step) if tensorboard else None
        self._wandb = None if wandb is None else wandb()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, report: StepReport) -> None:
        """Take in one step."""
        if not self.is_main:
            return
        self._log.write(json.dumps(report.log_entry()) + "\n")
        self._log.flush()
        self._window.append(report)
        self._recent.append(report.seconds)
        if report.step % self.log_every == 0 or report.step >= self.total_steps:
            left_s = (self.total_steps - report.step) * sum(self._recent) / len(self._recent)
            means = window_means(self._window)
            logger.info(progress_line(self._window, means, self.total_steps, left_s))
            self.scalars(report.step, means)
            self._window = []

    def validation(self, step: int, figures: Mapping[str, float]) -> None:
        """Take in the figures of a validation, named `val/…`: a line of `val_log.jsonl`, one for people, TensorBoard."""
        if not self.is_main:
            return
        self._append(VALIDATION_FILE, step, figures)
        short = {name.removeprefix("val/"): value for name, value in figures.items() if name.count("/") == 1}
        seconds = short.pop("seconds", 0.0)
        shown = " ".join(f"{name} {value:.4f}" for name, value in short.items())
        logger.info("validation at step %d: %s | %s", step, shown, duration(seconds))
        self.scalars(step, figures)

    def curves(self, step: int, figures: Mapping[str, float]) -> None:
        """Take in figures that are not there in every step (train/curves.py): a line of `curves.jsonl`, TensorBoard."""
        if self.is_main and figures:
            self._append(CURVES_FILE, step, {n: x if math.isfinite(x) else None for n, x in figures.items()})
            self.scalars(step, figures)

    def _append(self, name: str, step: int, figures: Mapping[str, float | None]) -> None:
        """Write a line to a file that is there from its first line on."""
        if name not in self._files:
            self._files[name] = reopen_log(self._directory / name, self._first_step)
        self._files[name].write(json.dumps({"step": step, **figures}) + "\n")
        self._files[name].flush()

    def validations(self) -> list[dict[str, float]]:
        """The figures of the validations before the run's first step; none on other ranks than 0."""
        path = self._directory / VALIDATION_FILE
        if not self.is_main or not path.exists():
            return []
        reopen_log(path, self._first_step).close()
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def image(self, step: int, tag: str, pixels: NDArray[np.uint8]) -> None:
        """Show a picture `hh ww 3` in TensorBoard and Weights & Biases."""
        if not self.is_main:
            return
        if self._board is not None:
            self._board.add_image(tag, pixels, step, dataformats="HWC")
        if self._wandb is not None:
            wandb = require("wandb", package="wandb", extra="tracking", why="--enable_wandb")
            self._wandb.log({f"{tag}/samples": wandb.Image(pixels)}, step=step)

    def note(self, line: str) -> None:
        """Say something between progress lines."""
        if self.is_main:
            logger.info("%s", line)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Write values to TensorBoard and Weights & Biases (say, of a validation)."""
        if not self.is_main:
            return
        if self._board is not None:
            for tag, value in values.items():
                self._board.add_scalar(tag, value, step)
            self._board.flush()
        if self._wandb is not None:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        """Write out everything; before the process ends, because it does not end the usual way."""
        if not self.is_main:
            return
        self._log.close()
        for file in self._files.values():
            file.close()
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def wandb_starter(args: TrainArgs, flags: Mapping[str, Any]) -> Callable[[], Any] | None:
    """What starts the run on Weights & Biases that the flags ask for; None if none is asked for.

    Args:
        args: the run's `wandb_*` flags.
        flags: every flag, to be shown there.

    Raises:
        ImportError: at once, if the package is missing.
    """
    if not args.enable_wandb:
        return None
    wandb = require("wandb", package="wandb", extra="tracking", why="--enable_wandb")
    return lambda: wandb.init(
        project=args.wandb_project,
        name=args.wandb_name,
        id=f"{args.wandb_name}-run{args.wandb_runid}",
        resume=args.wandb_resume,
        mode="offline" if args.wandb_offline else "online",
        config=dict(flags),
    )


def window_means(window: list[StepReport]) -> dict[str, float]:
    """TensorBoard's tags over some steps: each term's mean is over all that it counted, rates are over all the time."""
    last, seconds = window[-1], sum(r.seconds for r in window)
    tokens, samples = sum(r.tokens for r in window), sum(r.samples for r in window)
    losses = [r.loss for r in window if math.isfinite(r.loss)]
    means = {"loss": sum(losses) / len(losses) if losses else math.nan}
    for name in dict.fromkeys(name for r in window for name in r.losses):
        counts = [r.counts.get(name, 0.0) for r in window]
        if sum(counts):
            means[name] = sum(r.losses.get(name, 0.0) * c for r, c in zip(window, counts, strict=True)) / sum(
                counts
            )
        means[COUNT_TAGS.get(name, f"total_{name}")] = sum(counts)
    means["lr"] = last.top_lr
    means.update({f"lr_{group}": rate for group, rate in last.lr.items()})
    norms = [r.total_norm for r in window if math.isfinite(r.total_norm)]
    means["total_norm"] = sum(norms) / len(norms) if norms else math.nan
    if last.loss_scale != 1.0:
        means["loss_scale"] = last.loss_scale
    means["total_samples"] = samples
    means["tokens_per_step"] = tokens / len(window)
    means["tokens_per_sec"] = tokens / seconds
    means["samples_per_sec"] = samples / seconds
    if flops := sum(r.flops for r in window):
        means["actual_tflops"] = flops / seconds / 1e12
    if last.peak_tflops:
        means["mfu"] = means["actual_tflops"] / last.peak_tflops
    means.update({f"time/{name}": s / len(window) for name, s in _phases(window).items()})
    return {**means, **last.memory_mib}


def _phases(window: list[StepReport]) -> dict[str, float]:
    """Seconds of all steps together, by phase, and of whole steps."""
    sums: dict[str, float] = {}
    for report in window:
        for name, seconds in report.phases.items():
            sums[name] = sums.get(name, 0.0) + seconds
    return {**sums, "step": sum(r.seconds for r in window)} if sums else {}


def progress_line(
    window: list[StepReport], means: Mapping[str, float], total_steps: int, left_s: float
) -> str:
    """One line for people: where the run is, how it does, when it ends."""
    last = window[-1]
    names = dict.fromkeys(name for r in window for name in r.losses)
    terms = " ".join(f"{name} {means[name]:.4f}" for name in names if name in means)
    width = len(str(total_steps))
    mfu = f"MFU {means['mfu']:.1%} | " if "mfu" in means else ""
    return (
        f"step {last.step:>{width}}/{total_steps} | loss {means['loss']:.4f} | {terms} | lr {means['lr']:.1e} "
        f"norm {means['total_norm']:.2f} | {_short(means['tokens_per_sec'])} tok/s {means['samples_per_sec']:.1f} samples/s | "
        f"{mfu}{duration(left_s)} left"
    )


def duration(seconds: float) -> str:
    """`45s`, `3m20s`, `2h05m`, `4d03h`."""
    s = max(0, math.ceil(seconds))
    if s < 60:
        return f"{s}s"
    if s < 3600:
        return f"{s // 60}m{s % 60:02d}s"
    if s < 86400:
        return f"{s // 3600}h{s % 3600 // 60:02d}m"
    return f"{s // 86400}d{s % 86400 // 3600:02d}h"


def _set_aside(directory: Path) -> list[str]:
    """Give what an earlier run logged here a number; a log without a line goes unsaid.

    Returns:
        the new names.
    """
    log = directory / LOG_FILE
    if not log.exists() or not log.stat().st_size:
        return []
    number = next(n for n in itertools.count(1) if not log.with_suffix(f".{n}.jsonl").exists())
    names = []
    for name in (LOG_FILE, VALIDATION_FILE, CURVES_FILE, TENSORBOARD_DIR):
        path = directory / name
        if path.exists():
            target = path.with_name(f"{path.stem}.{number}{path.suffix}")
            path.rename(target)
            names.append(target.name)
    return names


def _short(number: float) -> str:
    return f"{number:.0f}" if number < 1000 else f"{number / 1000:.1f}k"


def _open_board(directory: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # a slow import that only rank 0 needs

    return SummaryWriter(str(directory), purge_step=first_step + 1 if first_step else None)
