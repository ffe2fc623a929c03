"""What the short entries share that train one part before the whole: `main_autoencoder.py` and `main_siglip.py`.

They hold their pictures in memory, and one message per step keeps the processes together.
"""

import json
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.distributed.collectives import all_sum
from train.distributed.session import World

logger = logging.getLogger(__name__)


def require_writable(output_dir: Path) -> None:
    """Make the directory.

    Raises:
        ValueError: if it cannot be made or written to.
    """
    probe = output_dir / ".write_probe"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {output_dir}: cannot write there ({error.strerror})") from error


def batch_rows(num_rows: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Endless global batches of row numbers: one shuffled pass over the rows after the other."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.zeros(0, dtype=torch.int64)
    while True:
        while len(rows) < batch_size:
            rows = torch.cat([rows, torch.randperm(num_rows, generator=generator)])
        yield rows[:batch_size]
        rows = rows[batch_size:]


def of_rank(world: World, rows: Tensor) -> Tensor:
    """The rows of a global batch that belong to this process."""
    return rows[world.rank :: world.size]


def summed(parts: Sequence[Tensor]) -> list[Tensor]:
    """The same tensors summed over all processes, in one message."""
    total = all_sum(torch.cat([part.flatten() for part in parts]))
    return [
        flat.view_as(part) for flat, part in zip(total.split([p.numel() for p in parts]), parts, strict=True)
    ]


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear up to 1 over the first `warmup` of the run, then a cosine down to 0."""
    if progress < warmup:
        return (progress + 1e-3) / (warmup + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


class ProgressLog:
    """Lines on standard output and JSON objects in a file; silent without a file (all but the first process)."""

    def __init__(self, file: Path | None):
        self._file = file
        if file is not None:
            file.write_text("", encoding="utf-8")

    def say(self, line: str) -> None:
        """Tell a person."""
        if self._file is not None:
            logger.info(line)

    def write(self, row: dict[str, Any], line: str) -> None:
        """Keep a row, and tell a person what it says."""
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            logger.info(line)
