"""Predicted against measured peak memory of a training step on a CPU, for several kinds of run.

    python benchmarks/memory_plan.py

Each row is a process (or two) of `train/main_benchmark.py`: the peak of its resident memory over what it took before the
model was built (but after a step of a tiny model, so that libraries are loaded), and what `train/activations.py` predicts from
the sizes alone. Every block of memory is given back to the system when it is freed (MALLOC_MMAP_THRESHOLD_), so that the peak is
that of what is in use. Ends with 1 if a prediction is more than 10 % off.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT = 0.10
FP32 = ("--param_dtype", "fp32", "--reduce_dtype", "fp32")

ROWS: dict[str, tuple[int, tuple[str, ...]]] = {
    "short texts, all activations kept": (1, (*FP32, "--texts", "4x256", "--recompute", "False")),
    "one long text": (1, (*FP32, "--texts", "1x2000", "--recompute", "False")),
    "short texts, layers run again": (1, (*FP32, "--texts", "8x256", "--recompute", "True")),
    "pictures seen and drawn": (
        1,
        (*FP32, "--see", "3x224x224", "--draw", "2x256x256", "--recompute", "False"),
    ),
    "wide vocabulary": (
        1,
        (*FP32, "--texts", "4x256", "--set", "llm.vocab_size=32768", "--recompute", "True"),
    ),
    "bf16, all activations kept": (1, ("--texts", "4x256", "--recompute", "False")),
    "two ranks, sharded": (
        2,
        (*FP32, "--texts", "8x256", "--sharding_strategy", "FULL_SHARD", "--recompute", "False"),
    ),
}
"""Name -> number of processes, flags."""


def main() -> int:
    """Measure every row (or those whose name holds a word of the command line) and print the table."""
    print(f"{'run':<36}{'measured':>10}{'predicted':>11}{'off by':>9}  highest at")
    worst = 0.0
    for name, (ranks, flags) in ROWS.items():
        if len(sys.argv) > 1 and not any(word in name for word in sys.argv[1:]):
            continue
        figures = measure(ranks, flags)
        peak, predicted = figures["memory/peak"], figures["memory/predicted"]
        off = predicted / peak - 1
        worst = max(worst, abs(off))
        print(
            f"{name:<36}{peak:>6.0f} MiB{predicted:>7.0f} MiB{off:>+8.1%}  {figures['memory/predicted_at']}",
            flush=True,
        )
    print(f"worst: {worst:.1%}, allowed: {LIMIT:.0%}")
    return int(worst > LIMIT)


def measure(ranks: int, flags: tuple[str, ...]) -> dict[str, float]:
    """The figures of one run, of rank 0."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    )
    command = [sys.executable, *launcher, str(ROOT / "train" / "main_benchmark.py"), "--json", *flags]
    command += ["--steps", "2", "--warm_up", "1"]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    env.setdefault("OMP_NUM_THREADS", "1")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


if __name__ == "__main__":
    sys.exit(main())
