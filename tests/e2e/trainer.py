"""The trainer as a person runs it: `torchrun train/main.py …` on two ranks, a time limit, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TIME_LIMIT_S = 90.0
SMALL = {
    "from_scratch": True,
    "expected_num_tokens": 500,
    "max_num_tokens": 700,
    "max_num_tokens_per_sample": 400,
    "num_lanes": 4,
    "num_workers": 1,
    "total_steps": 2,
    "warmup_steps": 2,
    "lr": 0.003,
    "eps": 1e-8,
    "param_dtype": "fp32",
    "reduce_dtype": "fp32",
    "recompute": False,
    "log_every": 1,
    "enable_tensorboard": False,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """How a run ended: exit code of torchrun (negative if it was killed) and all that was printed."""

    code: int
    output: str

    def lines(self, part: str) -> list[str]:
        return [line for line in self.output.splitlines() if part in line]


def command(num_ranks: int = 2, **flags: object) -> list[str]:
    """The command line: `SMALL`, changed by `flags`; a flag that is None is left out. One rank needs no launcher."""
    words = [f"--{name}={value}" for name, value in {**SMALL, **flags}.items() if value is not None]
    launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={num_ranks}", "--standalone"]
    return [
        sys.executable,
        *(launcher if num_ranks > 1 else ()),
        str(ROOT / "train" / "main.py"),
        *words,
    ]


def run_trainer(
    folder: Path,
    *,
    stop: Callable[[], bool] | None = None,
    num_ranks: int = 2,
    time_limit_s: float = TIME_LIMIT_S,
    **flags: object,
) -> Done:
    """Train until the end, or until `stop()` is true and every process gets SIGKILL.

    Args:
        folder: working directory; the output goes to `output.txt` there.
        stop: asked every few milliseconds.
        num_ranks: processes.
        time_limit_s: when a run counts as hanging.
        **flags: of the trainer.

    Raises:
        TimeoutError: if it runs longer than the limit; the processes are killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / "output.txt"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with output.open("w") as file:
        process = subprocess.Popen(
            command(num_ranks, **flags),
            cwd=folder,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + time_limit_s
    while process.poll() is None:
        is_late = time.monotonic() > deadline
        if is_late or (stop is not None and stop()):
            kill_all(process.pid)
            process.wait()
            if is_late:
                raise TimeoutError(f"longer than {time_limit_s:.0f} s:\n{output.read_text()}")
        time.sleep(0.003)
    return Done(code=process.returncode, output=output.read_text())


def kill_all(root: int) -> None:
    """SIGKILL to torchrun, then to its ranks; helpers of the ranks have to notice on their own, within seconds."""
    ranks = list(_children(root))
    helpers = [pid for rank in ranks for pid in _descendants(rank)]
    for pid in (root, *ranks):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left := [pid for pid in helpers if _is_running(pid)]:
        if time.monotonic() > deadline:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            raise AssertionError(f"{len(left)} processes of the killed ranks went on running")
        time.sleep(0.05)


def _children(pid: int) -> Iterator[int]:
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


def _descendants(pid: int) -> Iterator[int]:
    for child in _children(pid):
        yield child
        yield from _descendants(child)


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
