"""Do runs end well? Trains the quickstart's smallest model on two ranks, again and again, and counts how the runs ended.

On gloo, a process that ends the usual way aborts now and then, when its worker thread still holds the last collective's tensor
(train/distributed/session.py); once in ten or twenty runs, so only many runs show it. Every run is the real one: torchrun, two
steps, two checkpoints, the export. How it saves, loads data and logs takes turns.

    python -m tests.soak.exits --runs 40
"""

import argparse
import itertools
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.e2e.conftest import Quickstart, make_small
from tests.e2e.trainer import run_trainer

KINDS: dict[str, dict[str, object]] = {
    "saves in the background": {"async_checkpoint": True},
    "waits for saves": {"async_checkpoint": False},
    "writes TensorBoard files": {"enable_tensorboard": True},
    "loads in a worker": {"num_workers": 1},
}
SIGNS = ("terminate called", "Aborted", "SIGABRT", "core dumped", "Segmentation fault", "leaked")
"""What a bad end leaves in the output, whatever the exit code says."""


def main() -> int:
    """The number of runs that ended badly, at most 255."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=40)
    runs = parser.parse_args().runs
    ends: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        quickstart = make_small(Path(folder) / "quickstart")
        for number, kind in zip(range(1, runs + 1), itertools.cycle(KINDS)):
            began = time.monotonic()
            end = how_it_ended(quickstart, Path(folder) / "run", KINDS[kind])
            ends[end] += 1
            print(f"{number:3d}/{runs}  {time.monotonic() - began:5.1f} s  {kind}: {end}", flush=True)  # noqa: T201
    bad = runs - ends["well"]
    print(f"{runs} runs, {bad} ended badly: {dict(ends)}")  # noqa: T201
    return min(bad, 255)


def how_it_ended(quickstart: Quickstart, folder: Path, kind: dict[str, object]) -> str:
    """`well`, or what was wrong; the output of a run that ended badly is shown."""
    flags: dict[str, object] = {
        "dataset_config_file": quickstart.mixture,
        "model_path": quickstart.model,
        "results_dir": "results",
        "num_workers": 0,
        "save_every": 1,
        **kind,
    }
    done = run_trainer(folder, time_limit_s=600.0, **flags)
    steps = {path.name for path in (folder / "results" / "checkpoints").glob("*")}
    shutil.rmtree(folder)
    sign = next((sign for sign in SIGNS if sign in done.output), None)
    if done.code == 0 and sign is None and steps == {"0000001", "0000002"}:
        return "well"
    print(done.output)  # noqa: T201
    if done.code == 0 and sign is None:
        return f"with checkpoints {sorted(steps)}"
    return f"with code {done.code}" + (f", {sign}" if sign else "")


if __name__ == "__main__":
    sys.exit(main())
