"""`benchmarks/gpu.py` where there is no GPU: it says so, and with --tiny walks through all of itself."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from train.synthetic import SHAPES, synthetic_pack

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "gpu.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """A session sets these for its process."""
    precision, threads = torch.get_float32_matmul_precision(), torch.get_num_threads()
    yield
    torch.set_float32_matmul_precision(precision)
    torch.set_num_threads(threads)


def test_without_a_gpu_it_says_what_it_needs(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="CUDA GPU .* --tiny"):
        benchmark.main([])


def test_tiny_walks_through_every_back_end(benchmark, monkeypatch, capsys):
    real = benchmark.measure

    def full_for_batched(args, *rest, **more):
        if args.fsdp.attention == "batched":
            raise torch.OutOfMemoryError("no room for this\nand more")
        return real(args, *rest, **more)

    monkeypatch.setattr(benchmark, "measure", full_for_batched)
    benchmark.main(["--tiny", "--backends", "auto", "batched", "--recompute", "False"])
    *rows, device, _, _, _, auto, batched = capsys.readouterr().out.splitlines()
    first, second = map(json.loads, rows)
    assert (first["attention"], second) == (
        "auto",
        {"attention": "batched", "failed": "out of memory: no room for this"},
    )
    assert first["tokens"] > 0 and first["tokens_per_sec"] > 0 and first["tflops"] >= 0
    assert first["predicted_gib"] > 0 and {"forward", "backward", "optimizer"} <= first["step_s"].keys()
    assert auto.startswith("| auto |") and "no room for this" in batched


@pytest.mark.parametrize("tokens", [16384, 36864])
def test_a_pack_is_about_as_large_as_asked_for(benchmark, tokens):
    shape = SHAPES["small"]  # of the same patches; the pictures are what they are
    batch = benchmark.batch_of(tokens, shape)
    assert synthetic_pack(shape.bagel, batch, seed=0).num_tokens == pytest.approx(tokens, rel=0.05)
