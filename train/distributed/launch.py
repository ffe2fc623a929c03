"""torchrun, and to a scheduler what the ranks are to it: they get its signals, all the time they need, and it gets their code.

    python train/distributed/launch.py --nproc_per_node=8 [any option of torchrun] train/main.py --auto_resume True ...

torchrun by itself ends its ranks 30 seconds after a SIGTERM, dies of a SIGUSR1, and turns every exit code into 1. Here both
signals go to the ranks, which save and stop (`train/stop.py`), and a run that stopped so ends with 75 on every node. A signal
that comes while there are no ranks (other machines are waited for) is kept for those that are about to start; if none do, the
launcher ends with 75. Without a signal it is torchrun, but for the threads of ranks beside GPUs.
"""

import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any directory

import torch
from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import record

from data.processes import STOP_SIGNALS
from train.distributed.session import STOPPED_CODE, STOPPED_FILE

PATIENCE_S = 5.0
"""For ranks that are about to start when a signal comes."""


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun's command line; exits with `STOPPED_CODE` if the ranks were asked to stop and did."""
    args = run.parse_args(sys.argv[1:] if argv is None else list(argv))
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    if ":" in args.nnodes:
        # Torch would keep the address of the first round's store, and a machine that joins later would wait for it in vain.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    if torch.cuda.is_available():
        share_cores(run.determine_local_world_size(args.nproc_per_node))
    # Blocked signals stay blocked in the ranks, and wait there, until a rank is ready for them: none is lost while it starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    with tempfile.TemporaryDirectory() as folder:
        threading.Thread(target=_pass_on_signals, args=(Path(folder),), daemon=True).start()
        note = Path(folder) / "stopped"
        os.environ[STOPPED_FILE] = str(note)
        run.run(args)
        if note.exists():
            sys.exit(STOPPED_CODE)


def share_cores(ranks: int) -> None:
    """Divide this machine's cores among so many ranks, unless `OMP_NUM_THREADS` says otherwise.

    Torchrun would give each of several ranks one thread: too few for `--cpu_offload`, whose AdamW runs on the CPU.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // ranks)))


def _pass_on_signals(folder: Path) -> NoReturn:
    while True:
        if not pass_on(signal.sigwait(STOP_SIGNALS)):
            sys.stderr.write("stopped: no rank had started\n")
            shutil.rmtree(folder, ignore_errors=True)
            sys.stderr.flush()
            os._exit(STOPPED_CODE)  # the main thread waits in a rendezvous, whose other machines find out


def pass_on(number: int) -> bool:
    """Send a signal to all ranks of this machine, at the latest `PATIENCE_S` from now; whether there were any."""
    until = time.monotonic() + PATIENCE_S
    while not (ranks := list(_children())):
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    for pid in ranks:
        with suppress(ProcessLookupError):
            os.kill(pid, number)
    return True


def _children() -> Iterator[int]:
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


if __name__ == "__main__":
    main()
