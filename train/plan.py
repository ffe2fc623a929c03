"""Before a run: how much memory a step will take on every rank, how fast it will be, and how long the run.

    python -m train.plan --dataset_config_file MIXTURE.yaml --model_path DIR --gpus 8 --memory 80 --device H100 [trainer's flags]

In: the flags of `train/main.py`, and the machine. A sample of the records is looked at and packed as the trainer packs (nothing
is encoded, no weight is read); of the fullest packs, the memory is counted by `train/memory.py` and `train/activations.py`, of
all of them the operations by `modeling/bagel/flops.py`. Time is operations over the device's peak and an assumed MFU: what cannot
be known beforehand is said so. docs/engine.md has the formulas.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data.layout import num_tokens
from data.mixture import build_groups, load_mixture
from data.packing import pack
from data.prediction import Prediction, predict, simulated_packs
from data.scan import scan_groups
from data.stream import StreamPlan
from data.tokens import Tokenizer
from data.types import Sample
from modeling.autoencoder import read_config
from modeling.bagel.flops import PackShape, step_flops
from modeling.build import build_model
from train.activations import PeakBytes, predict_peak
from train.args import Args
from train.config import parse_args
from train.flops import PEAK_TFLOPS, passes_of, peak_tflops
from train.main import for_training, require_heads
from train.param_manager import freeze
from train.report import duration
from train.source import model_source

GIB = 2**30
OUTSIDE_GIB = 1.5
"""Of a GPU: the driver's context, kernels and NCCL's buffers, which no tensor is."""
SPLIT_UP = 0.05
"""Of a GPU: share of the tensors' memory that the allocator holds and cannot use."""
ASSUMED_MFU = 0.35
"""Packed 7B models have been trained at 0.3 to 0.55 by others; docs/performance.md has what was measured here."""
LAID_OUT, FULLEST = 16, 4
"""So many packs of all sizes are counted for the time, and so many of the largest for the memory."""
RECORDS = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Where a run will be.

    Attributes:
        gpus: ranks.
        memory_gib: of one of them.
        device: part of its name, as in `PEAK_TFLOPS`, or `cpu`.
        tflops: peak of one, dense, in bf16; 0: not known.
        mfu: share of it that useful operations will take.
    """

    gpus: int
    memory_gib: float
    device: str
    tflops: float
    mfu: float

    @property
    def device_type(self) -> str:
        return "cpu" if self.device == "cpu" else "cuda"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlook:
    """What is to be expected.

    Attributes:
        peak: of a rank's memory.
        tokens, flops: of a step, over all ranks, on average.
        packs: how the packs will be.
        total_steps: of the run.
    """

    peak: PeakBytes
    tokens: float
    flops: float
    packs: Prediction
    total_steps: int

    def needed_gib(self, machine: Machine) -> float:
        """Of one rank, with what no tensor is."""
        tensors = self.peak.total / GIB
        return tensors if machine.device_type == "cpu" else tensors * (1 + SPLIT_UP) + OUTSIDE_GIB

    def step_s(self, machine: Machine) -> float:
        """Seconds of a step; 0 if the device's peak is not known."""
        return self.flops / (machine.gpus * machine.tflops * 1e12 * machine.mfu) if machine.tflops else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the outlook: 0 if it fits, 1 if it does not, 2 if something is wrong with what was asked."""
    own, rest = _parser().parse_known_args(argv)
    try:
        args = parse_args(rest)
        machine = _machine(own, args)
        outlook = look_ahead(args, machine, records=own.records, num_workers=args.data.num_workers)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 2
    sys.stdout.write("\n".join(lines(outlook, machine, args)) + "\n")
    return int(outlook.needed_gib(machine) > machine.memory_gib)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m train.plan",
        description="How much memory and time a run will take. Takes the flags of train/main.py as well.",
    )
    parser.add_argument("--gpus", type=int, default=8, help="ranks [8]")
    parser.add_argument("--memory", type=float, default=80.0, help="GiB of one of them [80]")
    parser.add_argument("--device", default="H100", help=f"cpu, or one of {', '.join(PEAK_TFLOPS)} [H100]")
    parser.add_argument(
        "--mfu", type=float, default=ASSUMED_MFU, help=f"share of the peak that is used [{ASSUMED_MFU}]"
    )
    parser.add_argument(
        "--records", type=int, default=RECORDS, help=f"records of each group that are looked at [{RECORDS}]"
    )
    return parser


def _machine(own: argparse.Namespace, args: Args) -> Machine:
    tflops = peak_tflops("" if own.device == "cpu" else own.device, args.train.peak_device_tflops)
    if not tflops and own.device != "cpu":
        raise ValueError(
            f"--device {own.device}: its peak is not known; known are {', '.join(PEAK_TFLOPS)}; or give --peak_device_tflops"
        )
    for name, value in (
        ("gpus", own.gpus),
        ("memory", own.memory),
        ("mfu", own.mfu),
        ("records", own.records),
    ):
        if value <= 0:
            raise ValueError(f"--{name} {value} must be above 0")
    return Machine(gpus=own.gpus, memory_gib=own.memory, device=own.device, tflops=tflops, mfu=own.mfu)


def look_ahead(args: Args, machine: Machine, *, records: int, num_workers: int = 0) -> Outlook:
    """Look at some records, pack them, and count.

    Args:
        args: of the run.
        machine: where it will be.
        records: of each group that are looked at.
        num_workers: processes that look at them.

    Raises:
        ValueError: if the flags, the mixture or the model cannot be used.
    """
    source = model_source(args.model)
    tokenizer = Tokenizer(source.tokenizer_path)
    groups = build_groups(load_mixture(args.data.dataset_config_file), tokenizer, args.data.index_cache_dir)
    require_heads(source.config, groups, source.model_path)
    model = build_model(for_training(source.config, args, groups))
    plan = StreamPlan.from_flags(args.data, groups, model.config.layout, tokenizer.special)
    scans = scan_groups(
        plan, tokenizer, samples=records, keep=1, num_workers=num_workers, progress=lambda done, of: None
    )
    per_step = machine.gpus * args.train.gradient_accumulation_steps
    packs = sorted(simulated_packs(plan, scans), key=lambda samples: _tokens(samples, plan))
    # Every n-th from the emptiest to the fullest, and the fullest: laying out a pack takes as much memory as the pack.
    shapes = [
        PackShape.of(pack(samples, plan.layout, plan.special))
        for samples in (*packs[:: -(-len(packs) // LAID_OUT)], *packs[-FULLEST:])
    ]
    fullest, shapes = shapes[-FULLEST:], shapes[:-FULLEST] or shapes
    autoencoder = read_config(source.vae_path)
    freeze(model, args.params, args.optim.lr)
    passes = passes_of(model)
    flops = [step_flops(model.config, shape, passes, autoencoder) for shape in shapes]
    peaks = [
        predict_peak(
            model, args, shape, autoencoder, world_size=machine.gpus, device_type=machine.device_type
        )
        for shape in fullest
    ]
    return Outlook(
        peak=max(peaks, key=lambda peak: peak.total),
        tokens=per_step * sum(shape.tokens for shape in shapes) / len(shapes),
        flops=per_step * sum(flops) / len(flops),
        packs=predict(plan, scans, per_step),
        total_steps=args.optim.total_steps,
    )


def _tokens(samples: Sequence[Sample], plan: StreamPlan) -> int:
    return sum(num_tokens(sample, plan.layout) for sample in samples)


def lines(outlook: Outlook, machine: Machine, args: Args) -> list[str]:
    """The outlook for people."""
    needed, room = outlook.needed_gib(machine), machine.memory_gib
    parts = {name: value for name, value in outlook.peak.parts().items() if value}
    on_gpu = machine.device_type == "cuda"
    found = [
        f"memory of a rank: {needed:.2f} of {room:g} GiB, "
        + ("which fits" if needed <= room else f"which is {needed - room:.2f} GiB too much"),
        *(f"  {name:<14}{value / GIB:>9.3f} GiB" for name, value in parts.items()),
    ]
    if on_gpu:
        outside = needed - outlook.peak.total / GIB
        found.append(
            f"  {'no tensors':<14}{outside:>9.3f} GiB  assumed: {OUTSIDE_GIB} GiB and {SPLIT_UP:.0%} of the rest"
        )
    found.append(f"  highest at: {outlook.peak.moment} (docs/engine.md, Seeing and planning)")
    if host := outlook.peak.host:
        flag = "--cpu_offload" if args.fsdp.cpu_offload else "--ema_on_cpu"
        found.append(
            f"host memory of a rank ({flag}): {sum(host.values()) / GIB:.2f} GiB, every rank of a machine anew"
        )
        found += [f"  {name:<14}{value / GIB:>9.3f} GiB" for name, value in host.items() if value]
    if needed > room:
        found += [f"  may help: {advice}" for advice in _advice(outlook.peak, args)]
    found.append(
        f"a step: {outlook.tokens:,.0f} tokens in {machine.gpus * args.train.gradient_accumulation_steps} packs, "
        f"{outlook.packs.efficiency:.1%} full, {outlook.flops / 1e12:,.2f} TFLOP"
    )
    if seconds := outlook.step_s(machine):
        found += [
            f"speed: {outlook.tokens / seconds:,.0f} tokens/s, {seconds:.3g} s a step, if {machine.mfu:.0%} of "
            f"{machine.tflops:g} TFLOP/s are used",
            f"the run: {outlook.total_steps:,} steps in {duration(seconds * outlook.total_steps)} "
            f"({seconds * outlook.total_steps / 86400:.2f} days)",
        ]
    else:
        found.append(
            "speed: not known; give --peak_device_tflops and --mfu as train/main_benchmark.py measured them"
        )
    epoch = outlook.packs.steps_per_epoch
    found.append(
        f"an epoch: {epoch:,.1f} steps; the run reads the data {outlook.total_steps / epoch:.2f} times"
    )
    return [*found, *_assumptions(machine)]


def _advice(peak: PeakBytes, args: Args) -> list[str]:
    """What makes the largest parts smaller."""
    known: Mapping[str, str] = {
        "activations": "--recompute True" if not args.fsdp.recompute else "a smaller --max_num_tokens",
        "weights": "more GPUs, --cpu_offload True, frozen parts in bf16 (--frozen_dtype bf16), adapters (--lora_enable True)",
        "moments": "more GPUs, --cpu_offload True, adapters (--lora_enable True)",
        "averages": "--ema_on_cpu True, more GPUs, --cpu_offload True, adapters (--lora_enable True)",
        "gradients": "more GPUs, --cpu_offload True, adapters (--lora_enable True)",
        "gathered": "--sharding_strategy FULL_SHARD, a smaller --min_unit_params",
        "passing": "a smaller --max_num_tokens",
        "autoencoder": "smaller pictures to draw",
        "logits": "--freeze_embeddings True",
    }
    largest = sorted(peak.parts().items(), key=lambda part: -part[1])[:3]
    return list(dict.fromkeys(known[name] for name, value in largest if value))


def _assumptions(machine: Machine) -> list[str]:
    found = [
        "assumed:",
        "  packs are as those of the records that were looked at; the largest pack of the run may be larger",
        "  the data keep up, no picture's latents are cached, nothing is validated or saved meanwhile",
        "  not counted: perception heads, losses on decoded pictures, --compile; the time to start kernels and between",
        "    ranks, which is most of a small model's: measure it (train/main_benchmark.py)",
    ]
    if machine.device_type == "cuda":
        found.append("  the memory model is held against measured peaks on CPUs (benchmarks/memory_plan.py)")
        found.append(f"  MFU {machine.mfu:g} is a guess unless it was measured (train/main_benchmark.py)")
    return found


if __name__ == "__main__":
    sys.exit(main())
