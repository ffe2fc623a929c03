"""Where worker processes come from: a small server that has imported what they need, and is forked for each of them."""

import multiprocessing
import os
from collections.abc import Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


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
    try:
        forkserver.ensure_running()
    finally:
        for name in ("PYTHONPATH", "PYTHONSAFEPATH"):
            os.environ.pop(name)
            os.environ.update({name: before[name]} if name in before else {})
    return context
