"""What is done to a model's layers before it is sharded: run again in backward, whole or in part, and compiled.

A layer's pieces are its methods that are tensors in, tensors out. Attention stands between them and has another shape for every
pack: it is neither compiled here nor run again by selective recomputation.
"""

import functools
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from train.args import FsdpArgs
from train.distributed.units import Layer

PRODUCTS = [torch.ops.aten.mm.default, torch.ops.aten.addmm.default]
"""What selective recomputation keeps the results of."""

MAX_VARIANTS = 64
"""Compiled forms of one piece: a pack with or without tokens of a kind, a layer with or without gradient. Lengths are symbols, so
they make no new form."""


def prepare_layers(model: nn.Module, layers: Iterable[Layer], args: FsdpArgs, device_type: str) -> None:
    """Let the layers of a model be run again and compiled as they are told to; names of parameters stay.

    Args:
        model: whole, on any device.
        layers: of `train.distributed.units`.
        args: what compiles.
        device_type: where it will run: `cpu` or `cuda`.

    Raises:
        ValueError: if there is nothing to compile with.
    """
    for layer in layers:
        module = model.get_submodule(layer.fqn)
        if layer.compiled:
            require_compiler(args.compile_backend, device_type)
        for piece in layer.compiled:
            setattr(module, piece, _compiled(getattr(module, piece), args.compile_backend))
        if layer.rerun == "full":
            _run_again(module, "forward")
        # A compiled piece keeps the results of its products, and makes the rest again, by itself.
        elif layer.rerun == "selective" and not layer.compiled:
            keep = functools.partial(create_selective_checkpoint_contexts, PRODUCTS)
            for piece in layer.pieces:
                _run_again(module, piece, context_fn=keep)


def require_compiler(backend: str, device_type: str) -> None:
    """Find out at the start whether this machine can compile.

    Raises:
        ValueError: saying what is missing.
    """
    if backend != "inductor":
        return
    if device_type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise ValueError(
                "--compile needs Triton on a GPU, which is not installed or does not know this GPU: `pip install triton`, or "
                "leave the flag out"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler as error:
        raise ValueError(
            "--compile needs a C++ compiler on a CPU, and none was found: install g++ (or name one in CXX), or leave the flag out"
        ) from error


def _run_again(module: nn.Module, method: str, **how: Any) -> None:
    # Not torch's wrapper module: it would change the names of the parameters.
    setattr(
        module, method, functools.partial(checkpoint, getattr(module, method), use_reentrant=False, **how)
    )


def _compiled(piece: Any, backend: str) -> Any:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, MAX_VARIANTS)
    # Not `fullgraph`: what cannot be traced inside (kernels and layers of other packages) runs as it is.
    return torch.compile(piece, backend=backend, dynamic=True)
