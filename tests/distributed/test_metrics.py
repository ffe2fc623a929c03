"""Every metric over two ranks is what it is over one."""

import functools

import numpy as np
import pytest

from tests.distributed.launch import run_distributed
from tests.unit.metrics.test_metrics import SAMPLES
from train.distributed.collectives import gather_objects, rank, world_size
from train.metrics import METRICS


def figures(count: int) -> dict[str, dict[str, float]]:
    """Of `count` samples per metric, dealt out to the ranks in turn."""
    result = {}
    for name, kind in METRICS.items():
        rng, own = np.random.default_rng(1), kind()
        samples = [SAMPLES[name](rng) for _ in range(count)]
        for sample in samples[rank() :: world_size()]:
            own.update(*sample)
        everyone = functools.reduce(kind.merge, gather_objects(own))
        result[name] = everyone.compute()
    return result


def test_two_ranks_are_one() -> None:
    alone = figures(15)
    for of_rank in run_distributed(figures, 2, 15):
        for name, values in alone.items():
            assert of_rank[name] == pytest.approx(values, abs=1e-12), name
