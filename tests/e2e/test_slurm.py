"""The SLURM script as it stands, with stand-ins for SLURM: two machines on this one, told to stop, started again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.distributed.test_lookout import free_port
from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import ROOT, SMALL
from train.checkpoint import complete_steps
from train.distributed.session import STOPPED_CODE

LIMIT_S = 150
SRUN = """#!/usr/bin/env bash
shift # its one option
pids=()
trap 'kill -USR1 "${pids[@]}"' USR1
for ((node = 0; node < SLURM_NNODES; node++)); do
    SLURM_NODEID=$node "$@" &
    pids+=($!)
done
code=0
for pid in "${pids[@]}"; do
    wait "$pid"
    while kill -0 "$pid" 2>/dev/null; do wait "$pid"; done
    wait "$pid"
    now=$?
    ((now > code)) && code=$now
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
echo "$@" >>"$SCONTROL_CALLS"
[ "$1" = show ] && echo localhost
exit 0
"""


def job(folder: Path, quickstart: Quickstart, nodes: int, steps: int) -> subprocess.Popen[str]:
    programs = folder / "bin"
    programs.mkdir(exist_ok=True)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "SCONTROL_CALLS": str(folder / "calls.txt"),
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NODELIST": "node[0-1]",
        "SLURM_NNODES": str(nodes),
        "SLURM_CPUS_ON_NODE": "2",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "MASTER_PORT": str(free_port()),
        "PYTHON": sys.executable,
        "NUM_GPUS": "1",
        "OMP_NUM_THREADS": "1",
        "DATASET_CONFIG": str(quickstart.mixture),
        "MODEL_PATH": str(quickstart.model),
        "OUTPUT_DIR": str(folder / "run"),
    }
    flags = [
        f"--{name}={value}" for name, value in {**SMALL, "total_steps": steps, "save_every": 10_000}.items()
    ]
    return subprocess.Popen(
        ["bash", str(ROOT / "scripts" / "slurm" / "train.sbatch"), *flags],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def ended(process: subprocess.Popen[str], limit_s: float) -> str:
    try:
        return process.communicate(timeout=limit_s)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(("asked", "given"), [({"SLURM_CPUS_PER_TASK": "64"}, "64"), ({}, "96")])
def test_ranks_have_the_cores_of_the_job(tmp_path: Path, asked: dict[str, str], given: str) -> None:
    for name, text in (
        ("srun", '#!/usr/bin/env bash\necho "cores: $SRUN_CPUS_PER_TASK"\n'),
        ("scontrol", SCONTROL),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "slurm" / "train.sbatch")],
        env={
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "SCONTROL_CALLS": str(tmp_path / "calls.txt"),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "node[0-1]",
            "SLURM_NNODES": "2",
            "SLURM_CPUS_ON_NODE": "96",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "OUTPUT_DIR": str(tmp_path / "run"),
            **asked,
        },
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert (done.returncode, done.stdout) == (0, f"cores: {given}\n"), done.stderr


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT_S + 20)
def test_a_job_is_stopped_queued_again_and_goes_on(quickstart: Quickstart, tmp_path: Path) -> None:
    process = job(tmp_path, quickstart, nodes=2, steps=5000)
    log, deadline = tmp_path / "run" / "train_log.jsonl", time.monotonic() + LIMIT_S
    while not (log.exists() and len(log.read_text().splitlines()) >= 2):
        assert process.poll() is None and time.monotonic() < deadline, ended(process, 1)
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGUSR1)
    output = ended(process, LIMIT_S)
    assert process.returncode == STOPPED_CODE, output
    calls = (tmp_path / "calls.txt").read_text().splitlines()
    assert calls == ["show hostnames node[0-1]", "requeue 4711"]

    (step,) = complete_steps(tmp_path / "run" / "checkpoints")
    done = int(step.name)
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == list(range(1, done + 1))
    assert json.loads((step / "manifest.json").read_text())["world_size"] == 2
    logs = tmp_path / "run" / "logs" / "4711"
    assert len(list(logs.glob("node?/*/attempt_0/0/stdout.log"))) == 2  # a file per rank
    said = "".join(path.read_text() for path in logs.glob("node?/*/attempt_0/0/stderr.log"))
    assert f"stopped: SIGUSR1 received; saved after step {done}" in said

    process = job(tmp_path, quickstart, nodes=1, steps=done + 1)
    output = ended(process, LIMIT_S)
    assert process.returncode == 0, output
    assert f"continuing from {step}" in output
    assert (tmp_path / "run" / "model" / "manifest.json").is_file()
    assert "requeue 4711" not in (tmp_path / "calls.txt").read_text().splitlines()[len(calls) :]
