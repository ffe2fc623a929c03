"""A step of a 7B-shaped model on a GPU: tokens/s, TFLOP/s, MFU and GiB, by attention back end and size of pack.

    torchrun --standalone --nproc_per_node=1 benchmarks/gpu.py [--layers 8] [--pack 16384 24576 36864] [--steps 10]
    python benchmarks/gpu.py --tiny          # the same code with small shapes, on any machine

The published sizes (width, experts, vocabulary, picture tower, VAE) with 8 of the 28 layers, whose state fits one GPU of 140 GiB;
bf16 with every layer run again, the trainer's own step (train/main_benchmark.py). A third of a pack's tokens each: texts of 400,
pictures of 448 px that are asked about, pictures of 512 px that are drawn, which pass the VAE in every step. Flags of
`train/main.py` may follow (`--liger True`, `--compile True`, `--recompute_mode selective`, …).

Prints a line of JSON per back end and pack as soon as it is measured, then the table for docs/performance.md. What does not fit
is said in its row; the others are measured all the same. TFLOP/s and MFU count what training needs, without recomputation
(train/flops.py). Without a GPU it ends with 1, but for `--tiny`.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from modeling.ops.attention_backends import ATTENTION
from modeling.ops.matmul import set_matmul_precision
from train.config import parse_args
from train.distributed.session import World, run_entry, session
from train.main_benchmark import TINY, TINY_BATCH, measure
from train.synthetic import SHAPES, BatchShape, Shape, changed

TEXT, SEEN, DRAWN = 400, 448, 512
"""Tokens of a text; sides of pictures, in pixels."""
WORDS_SEEN, WORDS_DRAWN = 64, 32
"""Tokens of text that stand with a picture (train/synthetic.py)."""


def main(argv: Sequence[str] | None = None) -> None:
    own, rest = _parser().parse_known_args(argv)
    if not (torch.cuda.is_available() or own.tiny):
        raise ValueError(
            "benchmarks/gpu.py measures on a CUDA GPU and torch sees none here; --tiny walks through the same code on a CPU"
        )
    flags = ["--param_dtype", "fp32", "--reduce_dtype", "fp32"] if own.tiny else ["--reduce_dtype", "fp32"]
    rows: list[dict[str, Any]] = []
    args = parse_args(["--dataset_config_file", "made up", "--warmup_steps", "0", *flags, *rest])
    with session(args.train.dist_timeout_s, args.train.global_seed) as world:
        set_matmul_precision(args.fsdp.matmul_precision, world.device.type)
        for row in measured(own, [*flags, *rest], world):
            rows.append(row)
            if world.is_main:
                sys.stdout.write(json.dumps(row) + "\n")
                sys.stdout.flush()
        if world.is_main:
            sys.stdout.write(table(rows, world))
    if all("failed" in row for row in rows):
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=8, help="of the published 28")
    parser.add_argument(
        "--pack", type=int, nargs="+", default=(16384, 24576, 36864), help="tokens of a pack, about"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=tuple(ATTENTION), help="values of --attention; all that the device can train with"
    )  # fmt: skip
    parser.add_argument("--steps", type=int, default=10, help="steps that are measured")
    parser.add_argument("--warm_up", type=int, default=3, help="steps before")
    parser.add_argument("--tiny", action="store_true", help="small shapes, one step: does the program work?")
    return parser


def measured(own: argparse.Namespace, flags: Sequence[str], world: World) -> Iterator[dict[str, Any]]:
    """A row per back end and pack."""
    backends = own.backends or [b for b in ATTENTION if world.device.type == "cuda" or b != "flex"]
    shape = TINY if own.tiny else changed(SHAPES["7b"], [f"llm.num_hidden_layers={own.layers}"])
    packs = [TINY_BATCH] if own.tiny else [batch_of(tokens, shape) for tokens in own.pack]
    steps, warm_up = (1, 1) if own.tiny else (own.steps, own.warm_up)
    for batch in packs:
        for backend in backends:
            args = parse_args(
                ["--dataset_config_file", "made up", "--warmup_steps", "0", *flags, "--attention", backend]
            )
            row: dict[str, Any] = {"attention": backend}
            try:
                figures = measure(args, shape, batch, world, steps=steps, warm_up=warm_up)
            except torch.OutOfMemoryError as error:
                row["failed"] = f"out of memory: {str(error).splitlines()[0]}"
            else:
                row.update(chosen(figures))
            gc.collect()
            if world.device.type == "cuda":
                torch.cuda.empty_cache()
            yield row


def batch_of(tokens: int, shape: Shape) -> BatchShape:
    """A pack of about so many tokens, a third of each kind."""
    patch, cell = shape.bagel.vit.patch_size, shape.bagel.vae_downsample * shape.bagel.latent_patch_size
    seen, drawn = (SEEN // patch) ** 2 + WORDS_SEEN, (DRAWN // cell) ** 2 + WORDS_DRAWN
    third = tokens / 3
    return BatchShape(
        texts=((max(1, round(third / TEXT)), TEXT),),
        see=((max(1, round(third / seen)), SEEN, SEEN),),
        draw=((max(1, round(third / drawn)), DRAWN, DRAWN),),
    )


def chosen(figures: dict[str, Any]) -> dict[str, Any]:
    """What is reported of a run's figures."""
    return {
        "tokens": round(figures["tokens_per_step"]),
        "tokens_per_sec": round(figures["tokens_per_sec"], 1),
        "tflops": round(figures["actual_tflops"], 3),
        "mfu": round(figures["mfu"], 4) if "mfu" in figures else None,
        "peak_gib": round(figures["memory/peak"] / 2**10, 3),
        "predicted_gib": round(figures["memory/predicted"] / 2**10, 3),
        "step_s": {
            name.removeprefix("time/"): round(x, 4) for name, x in figures.items() if name.startswith("time/")
        },
    }


def table(rows: Sequence[dict[str, Any]], world: World) -> str:
    """In Markdown."""
    lines = [
        f"{world.size} x {world.device_name or 'CPU'}, torch {torch.__version__}",
        "",
        "| attention | tokens a pack | tokens/s | TFLOP/s | MFU | GiB | predicted |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['attention']} | {row['failed']} | | | | | |")
            continue
        mfu = "-" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(
            f"| {row['attention']} | {row['tokens']:,} | {row['tokens_per_sec']:,.0f} | {row['tflops']:.4g} | {mfu} "
            f"| {row['peak_gib']:.2f} | {row['predicted_gib']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_entry(main)
