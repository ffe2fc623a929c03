"""The model flags reach the model's source, and what a run leaves out stays out of its exports."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling.bagel.bagel import Bagel
from modeling.build import load_model
from modeling.source import FLAGS
from tests.unit.modeling.published import LLM, TABLES, VIT, write_autoencoder, write_json, write_tokenizer
from train.args import GROUPS
from train.config import FLAGS as EVERY_FLAG
from train.config import build_args
from train.ema import Ema
from train.export import export_model
from train.source import model_source
from train.state import TrainState


def directory(folder: Path) -> Path:
    write_json(folder / "llm_config.json", LLM)
    write_json(folder / "vit_config.json", VIT)
    write_json(folder / "bagel_config.json", TABLES)
    write_autoencoder(folder)
    write_tokenizer(folder)
    return folder


def test_every_model_flag_of_a_source_is_a_flag_of_the_trainer() -> None:
    assert {*FLAGS} <= {
        name for name, row in EVERY_FLAG.items() if row.group == "model"
    } and "model" in GROUPS


def test_flags_reach_the_source(tmp_path: Path) -> None:
    args = build_args(
        {
            "model_path": str(directory(tmp_path)),
            "from_scratch": True,
            "connector_act": "relu",
            "copy_init_moe": True,
        }
    )
    source = model_source(args.model)
    assert (source.config.connector_act, source.copy_init_moe, source.from_scratch) == ("relu", True, True)
    assert source.vae_path == source.tokenizer_path == tmp_path


def test_a_part_that_is_left_out_is_not_exported(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    args = build_args(
        {"model_path": str(directory(tmp_path / "base")), "from_scratch": True, "visual_gen": False}
    )
    source = model_source(args.model)
    model = Bagel(source.config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    state = TrainState.create(model, torch.optim.AdamW(model.parameters()), Ema(model, 0.9), num_lanes=1)
    export_model(state, source, tmp_path / "out", "run")
    stored = load_file(tmp_path / "out" / "ema.safetensors")
    assert not [
        k for k in stored if k.startswith(("vae2llm", "llm2vae", "time_embedder", "latent_pos_embed"))
    ]
    loaded = load_model(tmp_path / "out")
    assert not loaded.config.visual_gen
    assert all(
        torch.equal(x, stored[name]) for name, x in loaded.named_parameters() if "pos_embed" not in name
    )
