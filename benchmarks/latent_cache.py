"""What remembering the latents of pictures brings on a text-to-image step (`--latent_cache_mb`).

    python benchmarks/latent_cache.py [--rounds 7] [--pictures 2] [--side 256]

The trainer's own step (`train/loop.py`) on packs of one caption and one picture each, a model of 32 M parameters (`small` of
train/synthetic.py), the VAE in its published size, one process and thread; CPU time, medians over interleaved rounds. A round is
an epoch: every picture once. `encoded` encodes each picture each time; `cached` finds what it has seen, by the content of the
pixels after their transform. `fp32`: step and encoding in float32. `bf16`: forward and backward in bf16 and, as the published
trainer has it, encoding under bf16's autocast, which is more than twice as fast.

The cache lies in the memory of its process: after a restart the first epoch encodes again. Exits with 1 unless `cached` is 5
times as fast in both, or if a cached latent is not to the bit what encoding gives.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.types import PackedBatch
from modeling.autoencoder import AutoEncoderConfig
from modeling.bagel.latents import LatentEncoder
from modeling.ops.matmul import set_matmul_precision
from modeling.types import FlowState
from train.config import parse_args
from train.distributed.session import World, run_entry, session
from train.loop import Run, training_step
from train.main_benchmark import build
from train.state import TrainState
from train.synthetic import SHAPES, BatchShape, synthetic_pack

GOAL = 5.0


class InBf16(LatentEncoder):
    """Encodes as the published trainer does: under bf16's autocast."""

    def __call__(self, batch: PackedBatch) -> FlowState:
        with torch.autocast("cpu", torch.bfloat16):
            flow = super().__call__(batch)
        return FlowState(latents=flow.latents.float(), noise=flow.noise.float(), noised=flow.noised.float())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--pictures", type=int, default=2, help="of an epoch")
    parser.add_argument("--side", type=int, default=256, help="of a picture, in pixels")
    args = parser.parse_args()
    with session() as world:
        torch.set_num_threads(1)
        set_matmul_precision("highest", "cpu")
        found = {
            dtype: measure(dtype, args.rounds, args.pictures, args.side, world) for dtype in ("fp32", "bf16")
        }
    passed = all(row["same_to_the_bit"] and row["ratio"] >= GOAL for row in found.values())
    sys.stdout.write(json.dumps({"rounds": args.rounds, **found, "passed": passed}) + "\n")
    if not passed:
        raise SystemExit(1)


def measure(dtype: str, rounds: int, pictures: int, side: int, world: World) -> dict[str, Any]:
    """Times of both ways in one precision."""
    flags = ["--dataset_config_file", "made up", "--warmup_steps", "0", "--param_dtype", dtype, "--reduce_dtype", "fp32",
             "--recompute", "False", "--latent_cache_mb", "64"]  # fmt: skip
    args = parse_args(flags)
    shape = replace(SHAPES["small"], autoencoder=AutoEncoderConfig())
    run, state = build(args, shape, world)
    packs = [
        synthetic_pack(shape.bagel, BatchShape(draw=((1, side, side),)), seed=n) for n in range(pictures)
    ]
    vae, patch = run.encoder.vae, shape.bagel.latent_patch_size
    encoder = InBf16 if dtype == "bf16" else LatentEncoder
    ways = {
        "encoded": replace(run, encoder=encoder(vae, patch)),
        "cached": replace(run, encoder=encoder(vae, patch, args.data.latent_cache_mb)),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        epoch(way, state, packs[:1])  # kernels are loaded, memory is touched
    epoch(ways["cached"], state, packs)  # the first one encodes
    again, anew = (ways[name].encoder(packs[-1]) for name in ("cached", "encoded"))
    same = torch.equal(again.latents, anew.latents)
    for _ in range(rounds):
        for name, way in ways.items():
            seconds[name].append(epoch(way, state, packs) / pictures)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    return {
        "tokens": packs[0].num_tokens,
        "cpu_ms": {name: round(1e3 * statistics.median(row), 1) for name, row in seconds.items()},
        "ratio": round(ratio, 2),
        "same_to_the_bit": same,
    }


def epoch(run: Run, state: TrainState, packs: list[PackedBatch]) -> float:
    """CPU seconds of a step on each pack."""
    begun = time.process_time()
    for pack in packs:
        training_step(run, state, iter([pack]))
    return time.process_time() - begun


if __name__ == "__main__":
    run_entry(main)
