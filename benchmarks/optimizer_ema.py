"""What follows backward (clipping, AdamW, the average of weights) beside the published way; and the average's share of a step.

    python benchmarks/optimizer_ema.py [--rounds 7] [--layers 8]

**Tail**: about 68 M parameters in float32, one thread, CPU time, medians over interleaved rounds. Published (what Bagel's trainer
does): `clip_grad_norm_`, AdamW as it is by default, the average by `_foreach_mul_` and `_foreach_add_`. Then one thing at a time
is exchanged: `fused`, AdamW in one call; `lerp`, the average in one pass; `ours`, what `train/loop.py` calls, which clips within
AdamW, on sharded parameters (one rank). Gradients are clipped; in the `unclipped` rows their norm is small, which the published
way multiplies by 1. All work on the same memory, start from the same values, and are compared after an update.

**Share**: the quickstart's model, flags and data, the trainer's own step, one process; CPU time of `Ema.update` in that of the
whole step. Packs are made before.

Exits with 1 unless the tail is 2.1 times as fast and the share at most 5%.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.cpu_step import prepare, read_packs
from modeling.autoencoder import load_autoencoder
from modeling.build import build_model, initial_values
from modeling.ops.matmul import set_matmul_precision
from modeling.source import read_source
from train.args import Args
from train.assemble import build_run, build_state, prepare_model
from train.config import parse_args
from train.distributed.session import World, run_entry, session
from train.distributed.sharding import grad_norm, local
from train.loop import training_step
from train.optim import clip_factor, set_learning_rates, trained_parameters
from train.state import TrainState
from train.synthetic import SHAPES, changed

TAIL_GOAL, SHARE_GOAL = 2.1, 0.05
NORM = 1.0
LARGE, SMALL = 2.0, 0.5
"""Norms of the gradients: one that is clipped, one that is not."""

Update = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=8, help="of the model of the tail; 8: 68 M parameters")
    own = parser.parse_args()
    with session() as world:
        torch.set_num_threads(1)
        tail = measure_tail(own.layers, own.rounds, world)
        share = measure_share(own.rounds, world)
    passed = tail["ratio"] >= TAIL_GOAL and share["share"] <= SHARE_GOAL
    sys.stdout.write(
        json.dumps({"rounds": own.rounds, "tail": tail, "share": share, "passed": passed}) + "\n"
    )
    if not passed:
        raise SystemExit(1)


# --------------------------------------------------------------------------------------------------------------- the tail


def measure_tail(layers: int, rounds: int, world: World) -> dict[str, Any]:
    """Milliseconds of every way, ratios to the published one, and how far the results are apart."""
    args = parse_args(
        ["--dataset_config_file", "made up", "--warmup_steps", "0", "--param_dtype", "fp32", "--max_grad_norm", str(NORM)]
    )  # fmt: skip
    sizes = ("llm.hidden_size=512", "llm.intermediate_size=2048", f"llm.num_hidden_layers={layers}")
    model = build_model(changed(SHAPES["small"], sizes).bagel)
    prepare_model(model, args, world.device.type)
    state = build_state(model, args, world, initial_values(model.config, 0))
    sharded = trained_parameters(state.optimizer)
    unit = gradients(sharded)
    plain = [nn.Parameter(local(p.detach())) for p in sharded]  # the same memory
    for p, whole in zip(plain, sharded, strict=True):
        p.grad = local(whole.grad)
    names = {p: n for n, p in model.named_parameters()}
    averages = [local(state.ema.averages[names[p]]) for p in sharded]
    state.moments()  # made now: their memory is touched before anything is timed
    ways = {
        "published": (published(plain, averages, state, args, fused=False, lerp=False), LARGE),
        "fused": (published(plain, averages, state, args, fused=True, lerp=False), LARGE),
        "lerp": (published(plain, averages, state, args, fused=True, lerp=True), LARGE),
        "ours": (ours(state, args), LARGE),
        "published_unclipped": (published(plain, averages, state, args, fused=False, lerp=False), SMALL),
        "ours_unclipped": (ours(state, args), SMALL),
    }

    def set_gradients(norm: float) -> None:
        torch._foreach_copy_([p.grad for p in plain], unit)
        torch._foreach_mul_([p.grad for p in plain], norm)

    everything = [local(x) for x in state.tensors().values()]
    before = [x.clone() for x in everything]
    first: list[Tensor] = []
    apart = 0.0
    for name in ("published", "ours"):
        update, norm = ways[name]
        set_gradients(norm)
        update()
        if first:
            apart = max(float((a - b).abs().max()) for a, b in zip(first, everything, strict=True))
        first = [x.clone() for x in everything]
        torch._foreach_copy_(everything, before)
    del first, before

    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (update, norm) in ways.items():
            set_gradients(norm)
            begun = time.process_time()
            update()
            seconds[name].append(time.process_time() - begun)

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 2)

    return {
        "parameters_million": round(sum(p.numel() for p in plain) / 1e6, 1),
        "tensors": len(plain),
        "cpu_ms": {name: round(1e3 * statistics.median(row), 1) for name, row in seconds.items()},
        "ratio": ratio("published", "ours"),
        "ratio_unclipped": ratio("published_unclipped", "ours_unclipped"),
        "of_that": {
            "fused AdamW": ratio("published", "fused"),
            "average in one pass": ratio("fused", "lerp"),
            "clipping within AdamW": ratio("lerp", "ours"),
        },
        "largest_difference": apart,
    }


def gradients(parameters: list[nn.Parameter]) -> list[Tensor]:
    """Give every parameter a gradient, and return values for them whose joint norm is 1."""
    generator = torch.Generator().manual_seed(0)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    values = [torch.randn(local(p.detach()).shape, generator=generator) for p in parameters]
    norm = torch.stack(torch._foreach_norm(values)).norm()
    torch._foreach_div_(values, norm)
    return values


def published(
    parameters: list[nn.Parameter], averages: list[Tensor], state: TrainState, args: Args, *, fused: bool, lerp: bool
) -> Update:  # fmt: skip
    """The published tail, with its parts exchanged one by one. It works on the same moments as ours."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.optim.lr,
        betas=(args.optim.beta1, args.optim.beta2),
        eps=args.optim.eps,
        weight_decay=args.optim.weight_decay,
        fused=fused or None,
    )
    for plain, whole in zip(parameters, trained_parameters(state.optimizer), strict=True):
        optimizer.state[plain] = {key: local(x) for key, x in state.optimizer.state[whole].items()}
    decay = args.optim.ema

    @torch.no_grad()
    def average() -> None:
        weights = [p.detach() for p in parameters]
        if lerp:
            torch._foreach_lerp_(averages, weights, 1 - decay)
        else:
            torch._foreach_mul_(averages, decay)
            torch._foreach_add_(averages, weights, alpha=1 - decay)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, NORM)
        optimizer.step()
        average()

    return update


def ours(state: TrainState, args: Args) -> Update:
    """As `train/loop.py` does it."""
    parameters = trained_parameters(state.optimizer)

    def update() -> None:
        norm = float(grad_norm(parameters))
        set_learning_rates(state.optimizer, state.step, args.optim)
        state.optimizer.step(factor=clip_factor(norm, args.optim.max_grad_norm))
        state.ema.update(state.step)

    return update


# -------------------------------------------------------------------------------------------------------------- the share


def measure_share(rounds: int, world: World) -> dict[str, Any]:
    """CPU time of the average's update in that of a whole step of the quickstart."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder)
        base = str(folder / "base")
        args = parse_args(
            ["--config", str(ROOT / "configs" / "quickstart_run.yaml"), "--dataset_config_file", "made up",
             "--model_path", base, "--vit_path", base, "--results_dir", str(folder / "run")]
        )  # fmt: skip
        set_matmul_precision(args.fsdp.matmul_precision, world.device.type)
        model = build_model(read_source(base).config)
        prepare_model(model, args, world.device.type)
        state = build_state(model, args, world, initial_values(model.config, 0))
        run = build_run(
            model, args, world, load_autoencoder(base), journal=lambda step, packs: None, group_sizes={}
        )
        packs = itertools.cycle(read_packs(folder))
    spent: list[float] = []
    update = state.ema.update

    def timed(num_updates: int) -> None:
        begun = time.process_time()
        update(num_updates)
        spent.append(time.process_time() - begun)

    state.ema.update = timed  # type: ignore[method-assign]
    whole = []
    for _ in range(2 + rounds):
        begun = time.process_time()
        training_step(run, state, packs)
        whole.append(time.process_time() - begun)
    spent, whole = spent[2:], whole[2:]
    return {
        "parameters_million": round(sum(p.numel() for p in model.parameters()) / 1e6, 2),
        "step_ms": round(1e3 * statistics.median(whole), 1),
        "average_ms": round(1e3 * statistics.median(spent), 2),
        "share": round(statistics.median(a / b for a, b in zip(spent, whole, strict=True)), 4),
    }


if __name__ == "__main__":
    run_entry(main)
