"""Fused kernels in place of plain torch: a table of the operations that have both, and what puts one of them into a model.

Modules that use one have a class attribute `kernels`; `use_kernels` sets it. Plain torch is the rule that the others are held
against (tests/unit/modeling/test_kernels.py).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.ops.cross_entropy import linear_cross_entropy
from modeling.ops.rope import rotate
from modeling.optional import require


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """One way to compute each operation.

    Attributes:
        rms_norm: (x `… d`, weight `d`, eps) -> `… d`: normalised in float32, rounded to the type of `x`, times the weight.
        swiglu: (gate, up), of one shape -> silu(gate) x up.
        rotate: (q `s h e`, k `s g e`, cos, sin of `rope_table`) -> both rotated. The arguments may be overwritten.
        cross_entropy: see `linear_cross_entropy`.
    """

    rms_norm: Callable[[Tensor, Tensor, float], Tensor]
    swiglu: Callable[[Tensor, Tensor], Tensor]
    rotate: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    cross_entropy: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.float(), (x.shape[-1],), eps=eps).to(x.dtype) * weight


def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return rotate(q, cos, sin), rotate(k, cos, sin)


TORCH = Kernels(rms_norm=_rms_norm, swiglu=_swiglu, rotate=_rotate, cross_entropy=linear_cross_entropy)


def use_kernels(model: nn.Module, kernels: Kernels) -> None:
    """Let every module of the model that can use them do so."""
    for module in model.modules():
        if hasattr(module, "kernels"):
            vars(module)["kernels"] = kernels  # to the type checker its attributes are tensors and modules


def liger_kernels(device_type: str) -> Kernels:
    """Those of the Liger project, which are Triton's.

    Raises:
        ValueError: if the device is no GPU.
        ImportError: if the package is missing.
    """
    if device_type != "cuda":
        raise ValueError(f"--liger needs a GPU: its kernels do not run on {device_type}; leave the flag out")
    return _liger()


def _liger() -> Kernels:
    functional = require(
        "liger_kernel.transformers.functional", package="liger-kernel", extra="kernels", why="--liger"
    )

    def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        normed: Tensor = functional.liger_rms_norm(x, weight, eps, 0.0, "llama", False)
        return normed

    def swiglu(gate: Tensor, up: Tensor) -> Tensor:
        product: Tensor = functional.liger_swiglu(gate, up)
        return product

    def rotate_both(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # Theirs are `1 h s e` and `1 s e`.
        packed = (x.transpose(0, 1)[None] for x in (q, k))
        rotated = functional.liger_rope(*packed, cos.transpose(0, 1), sin.transpose(0, 1))
        new_q, new_k = (x[0].transpose(0, 1) for x in rotated)
        return new_q, new_k

    def cross_entropy(
        states: Tensor, weight: Tensor, labels: Tensor, amount: Tensor
    ) -> tuple[Tensor, Tensor]:
        # Per token, because tokens have amounts of their own; the weights' gradient is summed in float32, as ours.
        nll = functional.liger_fused_linear_cross_entropy(
            states.to(weight.dtype), weight, labels, reduction="none", accum_dtype=torch.float32
        ).float()
        return (nll * amount).sum(), nll.detach()

    # A grid of no blocks cannot be launched, and a pack may have nothing of a kind.
    return Kernels(
        rms_norm=_unless_empty(rms_norm, TORCH.rms_norm),
        swiglu=_unless_empty(swiglu, TORCH.swiglu),
        rotate=_unless_empty(rotate_both, TORCH.rotate),
        cross_entropy=_unless_empty(cross_entropy, TORCH.cross_entropy),
    )


def _unless_empty(fused: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    return lambda x, *rest: (fused if x.numel() else plain)(x, *rest)
