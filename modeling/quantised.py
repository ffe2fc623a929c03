"""Frozen matrices in 4 or 8 bits (bitsandbytes), for adapters to be trained beside them.

They take no part in sharding, averages or checkpoints: every rank holds them whole, and a run reads them anew. So they are made
in steps: `quantise` puts such layers into a model on the meta device; after adapters have been put around them,
`take_matrices_out` leaves them without a matrix while the model is sharded; `fill_quantised` gives each its own when the rest has
memory.
"""

import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from modeling.optional import require

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
OUTLIERS = 6.0
"""8 bits: columns of activations with a larger value are multiplied in 16 bits (LLM.int8(), arXiv:2208.07339)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """In what matrices are kept.

    Attributes:
        bits: 4 or 8.
        pattern: matches the names of the layers that have them.
        kind: the values of 4 bits, `nf4` or `fp4`.
        double: whether the blocks' scales of 4 bits are kept in 8 bits.
        dtype: a row of `DTYPES`: the matrices' before, and that of products with 4 bits.
    """

    bits: int
    pattern: str
    kind: str = "nf4"
    double: bool = True
    dtype: str = "fp32"

    def covers(self, module: str) -> bool:
        """Whether a layer's matrix is kept so."""
        return re.fullmatch(self.pattern, module) is not None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def bytes_of(self, outputs: int, inputs: int) -> int:
        """Of a matrix and its scales: 4 bytes per row; in 4 bits one scale per block, of 4 bytes or `double`."""
        if self.bits == 8:
            return outputs * inputs + 4 * outputs
        blocks = math.ceil(outputs * inputs / _block(inputs))
        scales = blocks + 4 * math.ceil(blocks / 256) if self.double else 4 * blocks
        return math.ceil(outputs * inputs / 2) + scales


def bitsandbytes() -> ModuleType:
    """The library.

    Raises:
        ImportError: naming the package and how to install it.
    """
    return require("bitsandbytes", package="bitsandbytes", extra="quant", why="a base in 4 or 8 bits")


def quantise(model: nn.Module, precision: Precision, device_type: str) -> dict[str, tuple[int, int]]:
    """Put layers without a matrix where a model's are to be kept in few bits.

    Args:
        model: on the meta device.
        precision: which, and how.
        device_type: where it will compute, `cpu` or `cuda`.

    Returns:
        name of each layer -> (outputs, inputs).

    Raises:
        ValueError: if a matrix is of a width that the library gets wrong on that device.
    """
    names = {n: m for n, m in model.named_modules() if precision.covers(n) and isinstance(m, nn.Linear)}
    for name, linear in names.items():
        parent, _, own = name.rpartition(".")
        layer = _layer(name, linear, precision, device_type)
        layer.bias = linear.bias
        model.get_submodule(parent).add_module(own, layer)
    # PEFT asks these of the model before it looks at the layers.
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = precision.bits == 4, precision.bits == 8  # type: ignore[assignment]
    return {name: (linear.out_features, linear.in_features) for name, linear in names.items()}


def take_matrices_out(model: nn.Module, names: Mapping[str, tuple[int, int]]) -> None:
    """Until `fill_quantised`, the layers have no matrix that sharding or counting could meet."""
    for name in names:
        _base(model, name).weight = None


@torch.no_grad()
def fill_quantised(
    model: nn.Module, name: str, value: Tensor, precision: Precision, device: torch.device
) -> None:
    """Give one layer its matrix, `o i`."""
    bnb, layer = bitsandbytes(), _base(model, name)
    value = value.to(DTYPES[precision.dtype])
    if precision.bits == 4:
        weight = bnb.nn.Params4bit(
            value,
            requires_grad=False,
            blocksize=_block(layer.in_features),
            compress_statistics=precision.double,
            quant_type=precision.kind,
            module=layer,
        )
    else:
        weight = bnb.nn.Int8Params(value, requires_grad=False, has_fp16_weights=False)
        # Said once per process and layer type by the library for every product that is not in 16 bits.
        warnings.filterwarnings("ignore", "MatMul8bitLt: inputs will be cast", UserWarning)
    layer.weight = weight.to(device)


@torch.no_grad()
def rounded(value: Tensor, precision: Precision) -> Tensor:
    """What a matrix `o i` becomes by being kept in few bits, float32: what adapters beside it have learned to correct."""
    functional = bitsandbytes().functional
    value = value.to(DTYPES[precision.dtype])
    if precision.bits == 8:
        codes, scales, _ = functional.int8_vectorwise_quant(value.half())
        return codes.float() * (scales / 127)[:, None]
    # As one row: on a CPU the library takes blocks to begin anew with every row, which is so in some widths only.
    codes, state = functional.quantize_4bit(
        value.reshape(1, -1),
        blocksize=_block(value.shape[1]),
        compress_statistics=precision.double,
        quant_type=precision.kind,
    )
    return functional.dequantize_4bit(codes, state).view_as(value).float()


def _layer(name: str, linear: nn.Linear, precision: Precision, device_type: str) -> nn.Module:
    bnb, bias = bitsandbytes(), linear.bias is not None
    size = (linear.in_features, linear.out_features, bias)
    with torch.device("meta"):
        if precision.bits == 8:
            return bnb.nn.Linear8bitLt(*size, has_fp16_weights=False, threshold=OUTLIERS)
        if device_type == "cpu" and linear.in_features % _block(linear.in_features):
            raise ValueError(
                f"{name}: on a CPU bitsandbytes reads 4-bit matrices wrongly unless they are a multiple of 32 wide, and this one "
                f"is {linear.in_features}; take --load_in_8bit True, or leave it out of --quant_target"
            )
        layer = bnb.nn.Linear4bit(
            *size,
            compute_dtype=DTYPES[precision.dtype],
            compress_statistics=precision.double,
            quant_type=precision.kind,
        )
    # On some CPUs a pass without gradient would repack the matrix for good, and training after it get no gradient.
    layer.support_avx512bf16_for_cpu = False
    return layer


def _block(width: int) -> int:
    """Numbers that share a scale: as published, or what divides a row (see `rounded`)."""
    return 32 if width % 64 and width % 32 == 0 else 64


def _base(model: nn.Module, name: str) -> Any:
    """A layer by its name before adapters were put around it."""
    layer = model.get_submodule(name)
    return getattr(layer, "base_layer", layer)
