"""torchrun, and to a scheduler what the ranks are to it: they get its signals, all the time they need, and it gets their code.

    python train/distributed/launch.py --nproc_per_node=8 [any option of torchrun] train/main.py --auto_resume True ...

torchrun by itself ends its ranks 30 seconds after a SIGTERM, dies of a SIGUSR1, and turns every exit code into 1. Here both
signals go to the ranks, which save and stop (`train/stop.py`), and a run that stopped so ends with 75 on every node. Without a
signal it is torchrun.
"""

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # runs from any directory

from torch.distributed import run
from torch.distributed.elastic.multiprocessing.errors import record

from data.processes import STOP_SIGNALS
from train.distributed.session import STOPPED_CODE, STOPPED_FILE


@record
def main(argv: Sequence[str] | None = None) -> None:
    """Run torchrun's command line; exits with `STOPPED_CODE` if the ranks were asked to stop and did."""
    args = run.parse_args(sys.argv[1:] if argv is None else list(argv))
    args.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"
    if ":" in args.nnodes:
        # Torch would keep the address of the first round's store, and a machine that joins later would wait for it in vain.
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # Blocked signals stay blocked in the ranks, and wait there, until a rank is ready for them: none is lost while it starts.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    threading.Thread(target=_pass_on_signals, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        note = Path(folder) / "stopped"
        os.environ[STOPPED_FILE] = str(note)
        run.run(args)
        if note.exists():
            sys.exit(STOPPED_CODE)


def _pass_on_signals() -> NoReturn:
    while True:
        number = signal.sigwait(STOP_SIGNALS)
        for pid in _children():
            with suppress(ProcessLookupError):
                os.kill(pid, number)


def _children() -> Iterator[int]:
    for task in Path(f"/proc/{os.getpid()}/task").glob("*/children"):
        yield from map(int, task.read_text().split())


if __name__ == "__main__":
    main()
