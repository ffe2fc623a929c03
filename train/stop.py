"""Ending a run in good order: a signal on any rank, and all ranks save after the same step and exit with `STOPPED_CODE`.

A scheduler sends SIGUSR1 some minutes before the time is up (`scripts/slurm`), or SIGTERM when it takes the machine away; a
person sends either.
"""

import signal
import threading
from types import FrameType

from data.processes import STOP_SIGNALS
from train.distributed.session import Stopped, forget_stop
from train.hooks import Hook
from train.state import TrainState


class StopOnSignal(Hook):
    """Notes the signals from now on. It has to be made in the main thread, before anything slow."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                signal.signal(number, self._note)
            forget_stop()
            signal.pthread_sigmask(
                signal.SIG_UNBLOCK, STOP_SIGNALS
            )  # `train/distributed/launch.py` starts ranks with both blocked

    def asks(self) -> bool:
        return self.received is not None

    def heard(self, state: TrainState) -> None:
        cause = f"{self.received.name} received" if self.received else "another rank was asked to end"
        if state.step == 0:
            raise Stopped(f"{cause}; nothing was trained yet, the same command begins again")
        raise Stopped(f"{cause}; saved after step {state.step}, the same command with --auto_resume goes on")

    def close(self) -> None:
        """A signal ends the process again, as everywhere else."""
        for number in STOP_SIGNALS:
            if signal.getsignal(number) == self._note:
                signal.signal(number, signal.SIG_DFL)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
