"""What a run keeps is counted as it is built; the recipes are run files."""

from pathlib import Path

import pytest
import torch
from torch import nn

from modeling.adapters import base_name
from modeling.build import build_model
from modeling.source import read_source
from tests.unit.train.adapting import args_of, built, write_directory
from train.config import build_args, read_run_file
from train.memory import as_sharded, state_bytes
from train.param_manager import freeze

RECIPES = Path(__file__).parents[3] / "configs" / "recipes"
CASES: dict[str, dict[str, object]] = {
    "whole": {"lora_enable": False, "freeze_vit": True, "box_lr": 0.0},
    "adapters": {"lora_modules_to_save": "mask", "param_dtype": "bf16", "frozen_dtype": "bf16"},
    "in 4 bits": {"load_in_4bit": True, "lora_target": "llm_attn", "bnb_4bit_use_double_quant": False},
    "in 4 bits, twice": {"load_in_4bit": True},
    "in 8 bits": {"load_in_8bit": True, "quant_target": "llm_all,vit"},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("memory") / "base")


@pytest.mark.parametrize("case", CASES)
def test_counted_as_built(base: Path, tmp_path: Path, case: str) -> None:
    args = args_of(base, tmp_path, **CASES[case])
    tuning, state = built(args)
    found = state_bytes(build_model(read_source(base).config), args)
    parameters = list(state.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    scales = sum(scale_bytes(state.model.get_submodule(name)) for name in getattr(tuning, "layers", ()))
    assert found.trained == sum(p.numel() for p in trained)
    assert found.weights == sum(p.nbytes for p in parameters) + scales
    assert found.gradients == sum(p.nbytes for p in trained)
    state.moments()
    moments = [state.optimizer.state[p][m] for p in trained for m in ("exp_avg", "exp_avg_sq")]
    assert found.moments == sum(x.nbytes for x in moments)
    assert found.averages == sum(x.nbytes for x in state.ema.averages.values())
    assert state_bytes(build_model(read_source(base).config), args, shards=2).moments == found.moments // 2
    stays, host = found.offloaded()
    assert stays.total == sum(x.nbytes for x in parameters if x.dtype in (torch.uint8, torch.int8)) + scales
    assert stays.total + sum(host.values()) == found.total


def test_sharding_does_not_see_matrices_in_few_bits(base: Path, tmp_path: Path) -> None:
    args = args_of(base, tmp_path, load_in_4bit=True)
    model = build_model(read_source(base).config)
    names = {n for n, _ in model.named_parameters()}
    freeze(model, args.params)  # nothing but adapters is trained, and they are not there yet
    with as_sharded(model, args):
        seen = {n for n, _ in model.named_parameters()}
    real = {base_name(n) for n, p in built(args)[1].model.named_parameters() if p.dtype != torch.uint8}
    assert seen == {n for n in real if ".lora_" not in n}
    assert {n for n, _ in model.named_parameters()} == names


def scale_bytes(layer: nn.Module) -> int:
    """Of what stands beside the matrix of a layer in few bits."""
    weight = getattr(layer, "base_layer", layer).weight
    if weight.dtype == torch.int8:
        return weight.SCB.nbytes
    state = weight.quant_state
    return state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_recipes_are_run_files(file: Path) -> None:
    args = build_args(read_run_file(file))
    assert args.params.lora_enable
    assert args.data.max_num_tokens_per_sample <= args.data.max_num_tokens
