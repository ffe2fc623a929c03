"""A sharded model is exported whole, one tensor after the other; a disk that is full stops every rank, and nothing hangs."""

import resource
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from modeling.bagel.init import initial_value
from modeling.bagel.shard_plan import shard_plan
from modeling.build import build_model
from modeling.source import read_source
from tests.distributed.launch import run_distributed
from tests.unit.modeling.published import LLM, TABLES, VIT, write_autoencoder, write_json, write_tokenizer
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.mesh import build_mesh
from train.distributed.sharding import materialise, shard_model
from train.ema import Ema
from train.export import export_model
from train.optim import build_optimizer
from train.param_manager import optimizer_groups
from train.state import TrainState


def directory(folder: Path) -> Path:
    folder.mkdir()
    write_json(folder / "llm_config.json", {**LLM, "tie_word_embeddings": True})
    write_json(folder / "vit_config.json", VIT)
    write_json(folder / "bagel_config.json", TABLES)
    write_tokenizer(folder)
    write_autoencoder(folder)
    return folder


def export(folder: str, limit: int) -> str:
    """Shard, export; returns what was said if it failed. `limit`: largest file in bytes that rank 0 may write, 0: any."""
    source = read_source(Path(folder) / "base", from_scratch=True)
    args = build_args({"param_dtype": "fp32", "reduce_dtype": "fp32", "min_unit_params": 0})
    model = build_model(source.config)
    shard_model(model, shard_plan(source.config), build_mesh(args.fsdp, world_size(), "cpu"), args.fsdp)
    materialise(
        model, torch.device("cpu"), lambda name, shape: initial_value(name, shape, source.config, 0) + 0.5
    )
    optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
    state = TrainState.create(model, optimizer, Ema(model, 0.9), num_lanes=1)
    if limit and rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    try:
        export_model(state, source, Path(folder) / "out", "run")
    except ValueError as error:
        return str(error)
    finally:
        if limit and rank() == 0:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    return ""


def expected(folder: Path) -> dict[str, Any]:
    config = read_source(folder / "base", from_scratch=True).config
    shapes = {name: x.shape for name, x in build_model(config).state_dict().items()}
    tied = {"language_model.lm_head.weight": "language_model.model.embed_tokens.weight"}
    return {n: initial_value(tied.get(n, n), shape, config, 0) + 0.5 for n, shape in shapes.items()}


def test_two_ranks_write_what_one_has(tmp_path: Path) -> None:
    directory(tmp_path / "base")
    assert run_distributed(export, 2, str(tmp_path), 0) == ["", ""]
    whole = expected(tmp_path)
    for kind in ("ema", "model"):
        stored = load_file(tmp_path / "out" / f"{kind}.safetensors")
        assert stored.keys() == whole.keys()
        assert all(torch.equal(stored[name], x) for name, x in whole.items())


def test_a_full_disk_ends_every_rank(tmp_path: Path) -> None:
    directory(tmp_path / "base")
    said = run_distributed(export, 2, str(tmp_path), 100_000)
    assert said[0] == said[1] and "out: the model cannot be written (File too large); make room" in said[0]
    assert [f.name for f in tmp_path.iterdir()] == ["base"]
