"""Memory of this process: how much it takes, and the most it took."""

import resource
import sys
from pathlib import Path

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident_mib() -> float:
    """What the process takes now, where the system tells (Linux); else the most it has taken."""
    return _field("VmRSS") or peak_mib()


def peak_mib() -> float:
    """The most that the process has taken since it began, or since `reset_peak`."""
    unit = 1 if sys.platform == "darwin" else 2**10  # bytes on a Mac
    return _field("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def reset_peak() -> None:
    """Let the peak begin at what is taken now.

    Raises:
        OSError: where the system has no way to.
    """
    CLEAR.write_text("5")


def _field(name: str) -> float:
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) / 2**10 for line in lines if line.startswith(f"{name}:")), 0.0)
