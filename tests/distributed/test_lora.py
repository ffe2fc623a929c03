"""Adapters on two ranks are those of one: beside a sharded base, and beside one in few bits that every rank holds whole."""

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from tests.distributed.launch import run_distributed
from tests.unit.train.adapting import args_of, built, train, write_directory

PER_UNIT = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 0}
CASES: dict[str, dict[str, object]] = {
    "sharded base": {**PER_UNIT, "lora_modules_to_save": "box"},
    "base in 4 bits": {**PER_UNIT, "load_in_4bit": True, "recompute": True},
    "base in 4 bits, bf16, offload": {
        **PER_UNIT,
        "load_in_4bit": True,
        "recompute": True,
        "cpu_offload": True,
        "param_dtype": "bf16",
        "frozen_dtype": "bf16",
    },
    "base in 8 bits, units joined": {"load_in_8bit": True, "lora_target": "mot_gen"},
    "frozen weights in bf16": {
        **PER_UNIT,
        "param_dtype": "bf16",
        "frozen_dtype": "bf16",
        "lora_modules_to_save": "box",
    },
}
IN_FP32 = {"base in 4 bits, bf16, offload": "base in 4 bits", "frozen weights in bf16": "sharded base"}


def both_steps(base: Path, results: Path, accumulation: int, sharded: bool) -> dict[str, list[float]]:
    """Two steps of every case, exported; losses by case."""
    losses = {}
    for name, flags in CASES.items():
        args = args_of(base, results / name, gradient_accumulation_steps=accumulation, **flags)
        if args.fsdp.param_dtype != "fp32" and not sharded:
            continue  # precision is FSDP's to change
        tuning, state = built(args, sharded=sharded)
        losses[name] = train(args, state)
        tuning.export(state)
    return losses


@pytest.mark.timeout(240)  # every process imports PEFT and bitsandbytes
def test_two_ranks_train_the_adapters_of_one(tmp_path: Path) -> None:
    base = write_directory(tmp_path / "base")
    two, other = run_distributed(both_steps, 2, base, tmp_path / "two", 1, True)
    assert two == other
    one = both_steps(base, tmp_path / "one", 2, False)
    for name in CASES:
        trained = tmp_path / "two" / name / "adapter"
        assert all(x.abs().max() > 1e-3 for key, x in adapter(trained, "model").items() if ".lora_B" in key)
        if name not in one:
            assert two[name] == pytest.approx(one[IN_FP32[name]], rel=1e-2)  # worst measured: 2.2e-3
            continue
        # Measured: no difference at all. A step has two packs, and a sum of two has no order.
        assert two[name] == pytest.approx(one[name], rel=1e-6)
        for kind in ("ema", "model"):
            found, expected = adapter(trained, kind), adapter(tmp_path / "one" / name / "adapter", kind)
            assert found.keys() == expected.keys()
            assert max(float((x - expected[key]).abs().max()) for key, x in found.items()) < 1e-6, (
                name,
                kind,
            )


def adapter(folder: Path, kind: str) -> dict[str, Tensor]:
    return load_file(folder / kind / "adapter_model.safetensors")
