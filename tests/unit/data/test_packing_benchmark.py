"""`benchmarks/packing.py` on its stated mixtures: nothing lost, packs full, nobody waits long, ranks equally loaded."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "packing.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("packing_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclass looks there
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("place, compat_loses", [(0, True), (1, False)])
def test_conserving_loses_nothing_and_fills_packs(benchmark, place, compat_loses):
    budget = benchmark.BUDGETS[place]
    ours = benchmark.run("conserving", budget, 5000, ranks=8, lanes=48)
    assert ours["read"] >= 5000 and ours["lost"] == 0
    assert ours["read"] == ours["trained"] + ours["waiting"] + ours["rejected"]
    assert ours["fill"] >= 0.98 and ours["slowest_rank_over_mean"] <= 1.1
    assert 0 < ours["packs_waited_max"] <= ours["packs_waited_bound"] == 50
    published = benchmark.run("upstream_compat", budget, 2000, ranks=8, lanes=48)
    assert (published["lost"] > 0.05 * published["read"]) == compat_loses
    assert published["fill"] < 0.95 and published["fill_times_balance"] < ours["fill_times_balance"] - 0.05
