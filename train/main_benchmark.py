"""Train on a made-up batch of any shape and print what it costs: speed, MFU, where the time goes, memory.

    torchrun --standalone --nproc_per_node=8 train/main_benchmark.py --shape 7b --set llm.num_hidden_layers=8 \
        --texts 40x400 --see 8x448x448 --draw 4x512x512 --steps 10
    python train/main_benchmark.py --shape small --texts 16x120 --see 2x224x224 --draw 1x256x256 --param_dtype fp32

The step is the trainer's own (`train/loop.py`): packing is done, what is measured begins with the pack in host memory. All flags
of `train/main.py` that say how to train are taken; the model has random weights. The same figures as in a run's log, by the same
formulas, and beside them what `train/activations.py` predicts of the memory.
"""

import argparse
import gc
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any directory

import torch

from modeling.autoencoder import AutoEncoder
from modeling.bagel.flops import PackShape
from modeling.build import build_model, initial_values
from modeling.ops.matmul import set_matmul_precision
from train.activations import predict_peak
from train.args import Args
from train.assemble import build_run, build_state, prepare_model
from train.config import parse_args
from train.distributed.session import World, run_entry, session
from train.host_memory import peak_mib, reset_peak, resident_mib
from train.loop import Run, training_step
from train.report import StepReport, window_means
from train.state import TrainState
from train.synthetic import SHAPES, BatchShape, Shape, changed, synthetic_pack

MIB = 2**20
TINY = changed(
    SHAPES["small"],
    ("llm.hidden_size=32", "llm.intermediate_size=64", "llm.num_hidden_layers=1", "llm.vocab_size=64", "ae.ch=32",
     "ae.num_res_blocks=1", "vit.hidden_size=32", "vit.intermediate_size=64", "vit.num_hidden_layers=1"),
)  # fmt: skip
TINY_BATCH = BatchShape(texts=((4, 64),), see=((1, 56, 56),), draw=((1, 64, 64),))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print; with `--json`, one line of JSON."""
    own, rest = _parser().parse_known_args(argv)
    # A mixture has to be named where one is trained on; here the batch is made up.
    args = parse_args(["--dataset_config_file", "made up", "--warmup_steps", "0", *rest])
    if args.params.lora_enable:
        raise ValueError("--lora_enable: adapters are not measured here; measure a run of train/main.py")
    with session(args.train.dist_timeout_s, args.train.global_seed) as world:
        set_matmul_precision(args.fsdp.matmul_precision, world.device.type)
        shape = changed(SHAPES[own.shape], own.set)
        batch = BatchShape.parse(own.texts, own.see, own.draw)
        figures = measure(args, shape, batch, world, steps=own.steps, warm_up=own.warm_up)
        if world.is_main:
            sys.stdout.write(json.dumps(figures) + "\n" if own.json else table(figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=tuple(SHAPES), default="small", help="sizes of the model")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="PART.FIELD=VALUE",
        help="another size: llm, vit, bagel, ae",
    )
    parser.add_argument("--texts", nargs="*", default=[], metavar="COUNTxTOKENS", help="texts of a pack")
    parser.add_argument(
        "--see", nargs="*", default=[], metavar="COUNTxHxW", help="pictures that are asked about"
    )
    parser.add_argument("--draw", nargs="*", default=[], metavar="COUNTxHxW", help="pictures that are drawn")
    parser.add_argument("--steps", type=int, default=5, help="steps that are measured")
    parser.add_argument("--warm_up", type=int, default=2, help="steps before")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    return parser


def measure(
    args: Args, shape: Shape, batch: BatchShape, world: World, *, steps: int, warm_up: int
) -> dict[str, Any]:
    """Train and measure; every rank must call.

    Returns:
        the figures of `train.report.window_means` over the measured steps; `memory/baseline`, `memory/peak` and
        `memory/predicted` in MiB, the peak and the prediction over the baseline.
    """
    on_gpu = world.device.type == "cuda"
    # Libraries, compiled kernels and the process group are no part of what a model takes.
    train_steps(args, TINY, TINY_BATCH, world, 1)
    gc.collect()
    if not on_gpu:
        reset_peak()
    baseline = 0.0 if on_gpu else resident_mib()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(world.device)
    reports = train_steps(args, shape, batch, world, warm_up + steps)[warm_up:]
    peak = torch.cuda.max_memory_allocated(world.device) / MIB if on_gpu else peak_mib() - baseline
    plain = build_model(shape.bagel)
    prepare_model(plain, args, world.device.type)
    sizes = PackShape.of(synthetic_pack(shape.bagel, batch, seed=0))
    predicted = predict_peak(
        plain, args, sizes, shape.autoencoder, world_size=world.size, device_type=world.device.type
    )
    return {
        **window_means(reports),
        "memory/baseline": baseline,
        "memory/peak": peak,
        "memory/predicted": predicted.total / MIB,
        "memory/predicted_at": predicted.moment,
        **{f"memory/predicted_{name}": value / MIB for name, value in predicted.parts().items()},
    }


def train_steps(args: Args, shape: Shape, batch: BatchShape, world: World, steps: int) -> list[StepReport]:
    """Build a run, train some steps, and forget it."""
    run, state = build(args, shape, world)
    packs = itertools.cycle([synthetic_pack(shape.bagel, batch, seed=100 * world.rank + n) for n in range(2)])
    accumulation = args.train.gradient_accumulation_steps
    reports = [training_step(run, state, itertools.islice(packs, accumulation)) for _ in range(steps)]
    return [report for report in reports if report is not None]


def build(args: Args, shape: Shape, world: World) -> tuple[Run, TrainState]:
    """A run without data, with random weights."""
    model = build_model(shape.bagel)
    prepare_model(model, args, world.device.type)
    vae = AutoEncoder(shape.autoencoder).to(world.device).eval().requires_grad_(False)
    state = build_state(model, args, world, initial_values(shape.bagel, args.train.global_seed))
    run = build_run(model, args, world, vae, journal=lambda step, packs: None, group_sizes={})
    return run, state


def table(figures: dict[str, Any]) -> str:
    """The figures, a line each."""
    lines = [
        f"{name:<32}{value if isinstance(value, str) else format(value, '.6g'):>14}"
        for name, value in figures.items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_entry(main)
