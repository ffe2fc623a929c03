"""How a run ends: 0 when all is well, at once and with one clear line when any rank fails. Through the real torchrun."""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from train.distributed.session import session

ROOT = Path(__file__).parents[2]
ENTRY = """
import sys
import torch
from data.processes import fork_server
from train.distributed.collectives import all_sum, barrier
from train.distributed.session import run_entry, session

HELD = []

def main():
    with session(timeout_s=60, seed=3) as world:
        how, failing_rank = sys.argv[1], int(sys.argv[2])
        assert all_sum(torch.ones(1)).item() == world.size
        if world.rank == failing_rank:
            if how == "value":
                raise ValueError("configs/x.yaml: unknown key 'wieght'; did you mean weight?")
            if how == "bug":
                raise KeyError("oops")
            if how == "queue":
                HELD.append(fork_server([]).Queue())
                HELD[0].put(1)
                raise ValueError("with a queue")
        barrier()
        sys.stdout.write(f"rank {world.rank} of {world.size} done\\n")  # one write: the ranks share the pipe

if __name__ == "__main__":
    run_entry(main)
"""


def launch(
    tmp_path: Path, ranks: int, *args: str, torchrun: bool = True
) -> tuple[subprocess.CompletedProcess, float]:
    script = tmp_path / "entry.py"
    script.write_text(ENTRY)
    prefix = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if torchrun else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, *prefix, str(script), *args],
        capture_output=True,
        text=True,
        timeout=110,
        env=environment,
    )
    return done, time.monotonic() - started


def test_success_under_torchrun(tmp_path: Path) -> None:
    done, _ = launch(tmp_path, 2, "fine", "-1")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["rank 0 of 2 done", "rank 1 of 2 done"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_mistake_on_one_rank_ends_all_with_one_line(tmp_path: Path, rank: int) -> None:
    done, seconds = launch(tmp_path, 2, "value", str(rank))
    assert done.returncode != 0
    prefix = "" if rank == 0 else "[rank 1] "
    line = f"{prefix}error: configs/x.yaml: unknown key 'wieght'; did you mean weight?"
    assert line in done.stderr.splitlines()
    assert "entry.py" not in done.stderr.split("error: configs")[0].replace(
        str(tmp_path), ""
    )  # no traceback before it
    assert "done" not in done.stdout
    assert seconds < 50  # the timeout of the group is 60


def test_a_bug_keeps_its_traceback_and_one_process_needs_no_torchrun(tmp_path: Path) -> None:
    done, _ = launch(tmp_path, 1, "bug", "0", torchrun=False)
    assert done.returncode == 1
    assert 'raise KeyError("oops")' in done.stderr
    assert done.stderr.splitlines()[-1] == "error: KeyError: 'oops'"
    done, _ = launch(tmp_path, 1, "value", "0", torchrun=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: configs/x.yaml: unknown key 'wieght'; did you mean weight?\n",
    )
    done, _ = launch(tmp_path, 1, "fine", "-1", torchrun=False)
    assert (done.returncode, done.stdout) == (0, "rank 0 of 1 done\n")


def test_no_semaphore_and_no_folder_outlives_a_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done, _ = launch(tmp_path, 1, "queue", "0", torchrun=False)
    assert done.stderr == "error: with a queue\n"  # and no warning of leaked semaphores
    assert [path.name for path in tmp_path.iterdir()] == ["entry.py"]


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    few, most = before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (few // 2, most))
        with session(timeout_s=5):
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, most)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_in_one_process_it_opens_and_closes_as_often_as_wanted() -> None:
    for _ in range(2):
        with session(timeout_s=5, seed=1) as world:
            assert (world.rank, world.size, world.is_main) == (0, 1, True)
            drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    with pytest.raises(ValueError, match="inside"), session():
        raise ValueError("inside")
    assert not torch.distributed.is_initialized()
