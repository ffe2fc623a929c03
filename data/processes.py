"""Where worker processes come from: a small server that has imported what they need, and is forked for each of them."""

import multiprocessing
import os
import signal
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What a scheduler, or a person, ends a run with."""


def fork_server(modules: Sequence[str]) -> ForkServerContext:
    """The server, started if it does not run yet.

    Workers are not forked from the caller: it has threads (gloo, NCCL, OpenMP) whose locks a fork would copy.

    Args:
        modules: imported by the server, once, not by every worker.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))
    # The server knows nothing of our `sys.path`: it would take a folder `data` of the working directory for this package.
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    before = dict(os.environ)
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")
    # A scheduler sends its signals to every process of a job. They are the trainer's, which saves; it needs its workers until
    # then. Blocked signals stay blocked in the server and in all that it forks (`obey_signals`).
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
    return context


def obey_signals() -> None:
    """In a worker: let the process be ended by a signal, as whoever started it may want to."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
