"""Cross entropy of the vocabulary projection: ours, by blocks, beside the published path, which has all logits at once.

    python benchmarks/loss_head.py [--vocab 32768] [--tokens 2048] [--width 1024] [--rounds 7]

Forward and backward, in fp32 with one thread, from states and projection to both gradients. Two figures each: CPU seconds, the
median over interleaved rounds; and the peak of memory beyond the inputs, in a process of its own: of tensors, and of the whole
process, which has the matrix library's working space besides.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from modeling.ops.cross_entropy import linear_cross_entropy


def published(states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
    """All logits, then `cross_entropy` per token, as the published model does it."""
    per_token = F.cross_entropy(F.linear(states, weight), labels, reduction="none")
    return (per_token * amount).sum()


def blocks(states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor) -> Tensor:
    """Ours."""
    return linear_cross_entropy(states, weight, labels, amount)[0]


PATHS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]] = {
    "published": published,
    "blocks": blocks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--peak", choices=PATHS, help="print one path's peak of memory in MiB, and nothing else"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.peak:
        print(json.dumps(peak_mib(PATHS[args.peak], args.vocab, args.tokens, args.width)))  # noqa: T201
        return
    # First, while this process is small: what a process has been at most is handed on to the processes that it starts.
    sizes = [f"--{n}={getattr(args, n)}" for n in ("vocab", "tokens", "width")]
    peaks = {name: json.loads(_run([*sizes, f"--peak={name}"])) for name in PATHS}
    data = inputs(args.vocab, args.tokens, args.width)
    seconds: dict[str, list[float]] = {name: [] for name in PATHS}
    results = {
        name: one_pass(path, *data) for name, path in PATHS.items()
    }  # kernels are loaded, results compared
    for _ in range(args.rounds):
        for name, path in PATHS.items():
            begun = time.process_time()
            one_pass(path, *data)
            seconds[name].append(time.process_time() - begun)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    differences = [
        float((a - b).abs().max() / b.abs().max())
        for a, b in zip(results["blocks"], results["published"], strict=True)
    ]
    row = {
        "vocab": args.vocab, "tokens": args.tokens, "width": args.width, "rounds": args.rounds,
        "seconds": {n: round(s, 3) for n, s in medians.items()},
        "time": round(statistics.median(b / a for a, b in zip(*seconds.values(), strict=True)), 3),
        "peak_mib": {n: {what: round(mib, 1) for what, mib in p.items()} for n, p in peaks.items()},
        "memory": {what: round(mib / peaks["published"][what], 3) for what, mib in peaks["blocks"].items()},
        "largest_relative_difference": dict(zip(("loss", "states", "weight"), differences, strict=True)),
    }  # fmt: skip
    print(json.dumps(row))  # noqa: T201


def inputs(vocab: int, tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, projection, labels, amounts."""
    g = torch.Generator().manual_seed(0)
    states = torch.randn(tokens, width, generator=g)
    weight = torch.randn(vocab, width, generator=g) * width**-0.5
    return states, weight, torch.randint(vocab, (tokens,), generator=g), torch.ones(tokens)


def one_pass(
    path: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], states: Tensor, weight: Tensor, *rest: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients."""
    x, w = states.detach().requires_grad_(), weight.detach().requires_grad_()
    loss = path(x, w, *rest)
    loss.backward()
    assert x.grad is not None and w.grad is not None
    return loss.detach(), x.grad, w.grad


def peak_mib(
    path: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], vocab: int, tokens: int, width: int
) -> dict[str, float]:
    """What one pass takes beyond its inputs: `tensors` as torch counts them, `process` as the resident set grows."""
    one_pass(path, *inputs(512, 256, width))
    data = inputs(vocab, tokens, width)
    before = _resident_mib()
    one_pass(path, *data)
    process = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        one_pass(path, *data)
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    now = accumulate(change for _, change in changes)
    return {"tensors": max(now) / 2**20, "process": process}


def _resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize() / 2**20


def _run(arguments: list[str]) -> str:
    command = [sys.executable, str(Path(__file__)), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


if __name__ == "__main__":
    main()
