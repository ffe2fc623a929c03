"""Sharding, precision, kernels."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag

Attention = Literal["auto", "split", "batched", "flex"]
Dtype = Literal["fp32", "bf16", "fp16"]
Strategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpArgs:
    """Sharding, precision, kernels."""

    sharding_strategy: Strategy = flag(
        "HYBRID_SHARD", "How parameters, gradients and optimizer state are divided."
    )
    zero_stage: int | None = flag(
        None,
        "DeepSpeed's name of a strategy: 0 is NO_SHARD, 1 and 2 are SHARD_GRAD_OP, 3 is FULL_SHARD.",
        low=0,
        high=3,
    )
    num_replicate: int = flag(1, "Replicas of HYBRID_SHARD.", low=1)
    num_shard: int = flag(0, "Ranks that share one replica; 0: all ranks / --num_replicate.", low=0)
    min_unit_params: int = flag(
        1_000_000,
        "A module with fewer parameters is not sharded alone: its collective would cost more than it saves.",
        low=0,
    )
    recompute: bool = flag(
        True, "Run transformer layers again in backward instead of keeping their activations."
    )
    recompute_mode: Literal["full", "selective"] = flag(
        "full",
        "What a layer keeps that is run again: `full` its input alone; `selective` attention and the results of its matrix "
        "products, so that only the cheap rest is done twice.",
    )
    recompute_every: int = flag(1, "Run every n-th layer again; the others keep their activations.", low=1)
    compile: bool = flag(
        False,
        "Compile every layer, but for attention, with torch.compile: some minutes at the start, faster steps.",
    )
    compile_backend: Literal["inductor", "aot_eager"] = flag(
        "inductor", "What --compile compiles with; `aot_eager` only traces, to find out what fails where."
    )
    param_dtype: Dtype = flag(
        "bf16",
        "Precision of forward and backward; the weights themselves are kept in fp32. fp16 scales the loss (--loss_scale) and is "
        "for GPUs without bf16.",
    )
    reduce_dtype: Dtype = flag("bf16", "Precision in which gradients are summed over ranks.")
    output_dtype: Dtype = flag("fp32", "Precision of the predictions that the losses see.")
    loss_scale: float = flag(
        65536.0,
        "With --param_dtype or --reduce_dtype fp16: what the loss is multiplied with at first, so that small gradients are not "
        "rounded to 0. Halved when gradients overflow (that step changes nothing).",
        low=1,
    )
    loss_scale_growth: int = flag(
        2000, "Steps without overflow after which the loss scale is doubled; 0: it stays as it is.", low=0
    )
    matmul_precision: Literal["highest", "high", "medium"] = flag(
        "highest", "Inside fp32 matrix products: fp32, TF32, or bf16 products with fp32 sums (torch's names)."
    )
    attention: Attention = flag(
        "auto", "How the decoder's attention is computed; they agree to rounding. `flex` needs a GPU."
    )
    use_flex: bool = flag(False, "The same as --attention flex, where there is a GPU.")
    liger: bool = flag(
        False,
        "Liger's fused kernels on a GPU: RMSNorm, SwiGLU, rotary positions, cross entropy. Needs liger-kernel.",
    )
    cpu_offload: bool = flag(
        False,
        "Keep weights, gradients and optimizer state in host memory, where the optimizer then runs; a unit's weights come to the "
        "GPU when it computes.",
    )

    def backend(self, device_type: str) -> str:
        """The attention asked for: `--use_flex` counts on a GPU."""
        return "flex" if self.use_flex and device_type == "cuda" else self.attention

    def home(self, device: str) -> str:
        """Where shards lie between their uses, on a rank that computes on `device`."""
        return "cpu" if self.cpu_offload else device
