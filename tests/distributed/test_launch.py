"""The launcher by itself: signals that come while there are no ranks, threads beside GPUs."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_lookout import free_port
from tests.e2e.trainer import ROOT
from train.distributed import launch
from train.distributed.session import STOPPED_CODE


@pytest.mark.timeout(60)
def test_a_signal_before_there_are_ranks_ends_it(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train/distributed/launch.py"), "--nnodes=2", "--nproc_per_node=1",
         "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{free_port()}", str(tmp_path / "never.py")],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        while not blocks(process.pid, signal.SIGTERM):
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=30)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED_CODE, errors
    assert "no rank had started" in errors


def blocks(pid: int, number: int) -> bool:
    status = Path(f"/proc/{pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigBlk:")).split()[1]
    return bool(int(mask, 16) >> (number - 1) & 1)


def test_a_signal_waits_for_ranks_that_are_about_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    looked, rank = [], subprocess.Popen(["sleep", "60"])

    def children() -> list[int]:
        looked.append(time.monotonic())
        return [rank.pid] if len(looked) > 3 else []

    monkeypatch.setattr(launch, "_children", children)
    try:
        assert launch.pass_on(signal.SIGUSR1)
        assert rank.wait(10) == -signal.SIGUSR1 and len(looked) == 4
    finally:
        rank.kill()


@pytest.mark.parametrize(("given", "ranks", "threads"), [(None, 4, "3"), (None, 40, "1"), ("7", 4, "7")])
def test_ranks_beside_gpus_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, given: str | None, ranks: int, threads: str
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)))
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    launch.share_cores(ranks)
    assert os.environ["OMP_NUM_THREADS"] == threads
    monkeypatch.setenv("OMP_NUM_THREADS", threads)  # so that what was there before comes back
