"""A tiny trained model in a directory, and runs that train adapters on it, built as `train/main.py` builds them."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from data.packing import pack
from data.types import LaneCursor, PackedBatch
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, save_autoencoder
from modeling.bagel.shard_plan import shard_plan
from modeling.build import build_model
from modeling.source import read_source
from tests.unit.modeling.published import write_json, write_tokenizer
from tests.unit.modeling.tiny import SPEC, SPECIAL, every_sample, made_up_latents, tiny_config, tiny_model
from train.args import Args
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.mesh import build_mesh
from train.distributed.session import World
from train.distributed.sharding import DTYPES, materialise, shard_model
from train.ema import Ema
from train.loop import Run, training_step
from train.main import first_values
from train.objective import Objective
from train.optim import build_optimizer
from train.param_manager import freeze, keep_frozen_in, optimizer_groups
from train.state import TrainState
from train.tuning import Tuning, tuning_of

AUTOENCODER = AutoEncoderConfig(
    ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, z_channels=16, num_groups=4, resolution=64
)
WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 320}
ALL = {"lora_enable": True, "lora_target": "mot_und,mot_gen,vit", "lora_r": 4, "lora_alpha": 8}
FLAGS = {
    "param_dtype": "fp32",
    "reduce_dtype": "fp32",
    "recompute": False,
    "lr": 0.01,
    "warmup_steps": 0,
    "eps": 1e-6,
    "ema": 0.5,
    "lora_dropout": 0.0,
}


def write_directory(folder: Path) -> Path:
    """A model directory with last and averaged weights, which differ."""
    folder.mkdir(parents=True)
    config = tiny_config(**WIDTHS)
    write_json(folder / "llm_config.json", asdict(config.llm))
    write_json(folder / "vit_config.json", asdict(config.vit))
    bagel = {"max_latent_size": 4, "vit_max_num_patch_per_side": 8, "heads": config.heads}
    write_json(folder / "bagel_config.json", bagel)
    write_tokenizer(folder)
    torch.manual_seed(1)
    save_autoencoder(AutoEncoder(AUTOENCODER), folder)
    for kind, seed in (("model", 0), ("ema", 5)):
        save_file(dict(tiny_model(config, seed).state_dict()), folder / f"{kind}.safetensors")
    return folder


def args_of(base: Path, results: Path, **flags: object) -> Args:
    return build_args({**FLAGS, **ALL, "model_path": str(base), "results_dir": str(results), **flags})


def built(args: Args, *, sharded: bool = False) -> tuple[Tuning, TrainState]:
    """As `train/main.py` builds them."""
    source = read_source(args.model.model_path)
    tuning = tuning_of(args, source, None)
    model = build_model(source.config)
    base = first_values(args, source, model, None)
    tuning.attach(model, "cpu")
    freeze(model, args.params, args.optim.lr)
    keep_frozen_in(model, DTYPES[args.params.frozen_dtype])
    values = tuning.values(base)
    if sharded:
        shard_model(model, shard_plan(model.config), build_mesh(args.fsdp, world_size(), "cpu"), args.fsdp)
    materialise(model, "cpu", values)
    tuning.complete(model, values, torch.device("cpu"))
    optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
    state = TrainState.create(model, optimizer, Ema(model, args.optim.ema), num_lanes=8)
    state.unstored = tuning.unstored
    return tuning, state


def packs(count: int) -> list[PackedBatch]:
    """Each with some of the samples: not every pack has every modality."""
    samples = every_sample()
    return [
        pack(samples[i % 2 :: 2] if i % 3 else samples, SPEC, SPECIAL, cursor=LaneCursor(lane=i))
        for i in range(count)
    ]


def train(args: Args, state: TrainState, steps: int = 2, packs_per_step: int = 2) -> list[float]:
    """Losses of steps over the same packs; pack `i` of a step goes to rank `i % W`."""
    assert args.train.gradient_accumulation_steps == packs_per_step // world_size()
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), state.model.config.heads),
        encoder=made_up_latents,  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes={},
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
    )
    batches = iter((packs(packs_per_step) * steps)[rank() :: world_size()])
    return [report.loss for _ in range(steps) if (report := training_step(run, state, batches))]
