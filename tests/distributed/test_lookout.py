"""Who is late is named, nobody hangs, and a run that is asked to stop ends with its code: two torchrun agents on loopback."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.distributed.lookout import Place, late_ranks
from train.distributed.session import STOPPED_CODE, Stopped
from train.stop import StopOnSignal

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 5
LAUNCH = str(ROOT / "train" / "distributed" / "launch.py")
ENTRY = """
import sys
import time
from pathlib import Path
import torch
from train.distributed.collectives import all_sum, barrier
from train.distributed.session import run_entry, session
from train.stop import StopOnSignal

def main():
    stop = StopOnSignal()
    with session(timeout_s=float(sys.argv[2])) as world:
        barrier()
        print(f"rank {world.rank} is ready", flush=True)
        if sys.argv[1] == "late":
            world.lookout.follow(lambda: (7, "data" if world.rank else "communication"))
            time.sleep(60 * world.rank)
            barrier()
        if sys.argv[1] == "elastic":
            sizes = Path(sys.argv[3])
            if world.is_main:
                with sizes.open("a") as file:
                    file.write(f"{world.size}\\n")
            barrier()
            if sizes.read_text().split() == ["1", "2", "1"]:
                return
        for _ in range(2000):  # steps, with the ranks' questions in their one collective
            time.sleep(0.05)
            if all_sum(torch.tensor(float(stop.asks()))):
                stop.heard(type("State", (), {"step": 3}))
        raise AssertionError("nobody asked")

if __name__ == "__main__":
    run_entry(main)
"""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def agent(folder: Path, launcher: Sequence[str], *args: str) -> subprocess.Popen[str]:
    """A machine with one rank."""
    script = folder / "entry.py"
    script.write_text(ENTRY)
    return subprocess.Popen(
        [sys.executable, *launcher, "--nproc_per_node=1", "--rdzv_backend=c10d", str(script), *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def two_agents(folder: Path, launcher: Sequence[str], *args: str) -> list[subprocess.Popen[str]]:
    """Two machines, all on this one."""
    options = [*launcher, "--nnodes=2", f"--rdzv_endpoint=localhost:{free_port()}"]
    return [agent(folder, options, *args) for _ in range(2)]


def ended(agents: list[subprocess.Popen[str]], limit_s: float) -> list[tuple[int, str]]:
    """Exit codes and output of all; none may run longer."""
    deadline = time.monotonic() + limit_s
    try:
        outputs = [agent.communicate(timeout=deadline - time.monotonic())[0] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    return [(agent.returncode, output) for agent, output in zip(agents, outputs, strict=True)]


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_late_rank_is_named_and_everything_ends(tmp_path: Path) -> None:
    agents = two_agents(tmp_path, ["-m", "torch.distributed.run"], "late", str(TIMEOUT_S))
    first, second = ended(agents, 90)
    assert first[0] != 0 and second[0] != 0
    output = first[1] + second[1]
    assert "waiting in step 7 for 2 s; late: rank 1 (step 7, data, for" in output
    line = (
        "error: the ranks waited for each other longer than --dist_timeout_s; late: rank 1 (step 7, data, for"
    )
    assert line in output, output
    assert "ending, because another rank has failed: " in output


@pytest.mark.slow
@pytest.mark.timeout(100)
def test_a_signal_to_one_agent_stops_all_ranks(tmp_path: Path) -> None:
    agents = two_agents(tmp_path, [LAUNCH], "steps", "60")
    assert agents[0].stdout is not None
    lines = []
    for line in agents[0].stdout:
        lines.append(line)
        if "is ready" in line:
            agents[0].send_signal(signal.SIGUSR1)
            break
    found = ended(agents, 80)
    assert [code for code, _ in found] == [STOPPED_CODE] * 2, "".join(lines) + found[0][1] + found[1][1]
    output = found[0][1] + found[1][1]
    assert "stopped: SIGUSR1 received; saved after step 3" in output
    assert "stopped: another rank was asked to end; saved after step 3" in output


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_machines_come_and_go(tmp_path: Path) -> None:
    sizes = tmp_path / "sizes"
    options = [LAUNCH, "--nnodes=1:2", f"--rdzv_endpoint=localhost:{free_port()}", "--max_restarts=3"]
    options.append("--rdzv_conf=last_call_timeout=1")

    def wait_for(expected: list[str]) -> None:
        deadline = time.monotonic() + 80
        while not (sizes.exists() and sizes.read_text().split() == expected):
            assert time.monotonic() < deadline, sizes.read_text() if sizes.exists() else "nothing started"
            time.sleep(0.1)

    first = agent(tmp_path, options, "elastic", "60", str(sizes))
    wait_for(["1"])
    second = agent(tmp_path, options, "elastic", "60", str(sizes))
    wait_for(["1", "2"])
    for pid in children(second.pid):
        os.kill(pid, signal.SIGKILL)
    second.kill()
    ((code, output), _) = ended([first, second], 90)
    assert code == 0, output
    assert "stopped: SIGTERM received; saved after step 3" in output  # when the second machine came
    assert sizes.read_text().split() == ["1", "2", "1"]


def children(pid: int) -> list[int]:
    return [int(p) for task in Path(f"/proc/{pid}/task").glob("*/children") for p in task.read_text().split()]


def test_who_is_late() -> None:
    def place(rank: int, step: int, phase: str, silent_s: float = 0.0) -> Place:
        return Place(rank, step, phase, 30.0, silent_s)

    waiting = [place(0, 5, "communication"), place(1, 5, "backward")]
    assert late_ranks(waiting) == []
    for late in (place(2, 4, "optimizer"), place(2, 5, "data"), place(2, 5, "backward", silent_s=40.0)):
        assert late_ranks([*waiting, late]) == [late]
    assert late_ranks([place(0, 5, "data"), place(1, 5, "data")]) == []  # nobody waits for anybody
    assert str(place(2, 5, "", 40.0)) == "silent for 40 s; last seen in step 5, between phases, for 30 s"


def test_a_run_that_is_ended_before_its_first_step_claims_no_checkpoint() -> None:
    stop = StopOnSignal()
    try:
        with pytest.raises(Stopped, match="nothing was trained yet, the same command begins again"):
            stop.heard(cast(Any, SimpleNamespace(step=0)))
        with pytest.raises(Stopped, match="saved after step 2, the same command with --auto_resume goes on"):
            stop.heard(cast(Any, SimpleNamespace(step=2)))
    finally:
        stop.close()
