"""What a step takes beside what is kept all the time (`train/memory.py`): activations, gathered weights, buffers; and the peak.

Everything is counted from the sizes of the model and of a pack, in bytes of one rank; docs/engine.md has the formulas. Which
tensors a layer keeps for its backward pass is as the code has it, and held against torch's own bookkeeping in a test. The peak is
the highest of these moments of a step:

    encode    the autoencoder's feature maps; no activations yet
    loss      all activations, a block of logits and the gradient of the vocabulary's projection, which is ready before backward
    turn      all activations, gathered weights, and what the last layer needs on its way back; gradients are only beginning
    trunk     the same at the first layer: what the other layers kept is gone, and their gradients are there
    end       the root unit's weights, its whole gradients, and the buffer that they are summed in
    update    all gradients
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from modeling.autoencoder import AutoEncoder, AutoEncoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.flops import PackShape
from modeling.bagel.shard_plan import shard_plan
from modeling.ops.attention import BATCHED_UP_TO
from modeling.ops.cross_entropy import block_size
from modeling.qwen2.mot import BLOCK
from train.args import Args
from train.distributed.mesh import mesh_shape
from train.distributed.units import Layer, layers, units
from train.memory import as_sharded, state_bytes

BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakBytes:
    """One moment of a step, in bytes of one rank.

    Attributes:
        moment: which one it is.
        weights, gradients, moments, averages: what is kept all the time, as far as it is there.
        activations: kept for the backward pass, of trunk and tower.
        gathered: weights that are whole, gradients that are, and buffers for sums.
        logits: a block of them, and the projection's gradient.
        autoencoder: its weights, and at `encode` its feature maps.
        passing: of the layer that is on its way back.
        host: beside all that, in host memory (`--cpu_offload`, `--ema_on_cpu`), by name; in no sum.
    """

    moment: str
    weights: int
    gradients: int
    moments: int
    averages: int
    activations: int = 0
    gathered: int = 0
    logits: int = 0
    autoencoder: int = 0
    passing: int = 0
    host: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """All summands by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("moment", "host")}


def predict_peak(
    model: Bagel,
    args: Args,
    shape: PackShape,
    autoencoder: AutoEncoderConfig,
    *,
    world_size: int = 1,
    device_type: str = "cuda",
) -> PeakBytes:
    """The highest moment of a step on one pack.

    Args:
        model: plain, on the meta device.
        args: of the run.
        shape: of its largest pack.
        autoencoder: sizes of the frozen one.
        world_size: ranks.
        device_type: `cuda` or `cpu`: attention and filling differ.

    Raises:
        ValueError: if flags name matrices or groups that there are not, or the strategy does not fit the ranks.
    """
    fsdp, config = args.fsdp, model.config
    _, shards = mesh_shape(fsdp, world_size)
    state = state_bytes(model, args, shards)
    host: dict[str, int] = {}
    if fsdp.cpu_offload and device_type == "cuda":  # elsewhere host memory is what a rank computes in
        state, host = state.offloaded()
    elif args.optim.ema_on_cpu and device_type == "cuda":
        state, host = state.averages_offloaded()
    kept: dict[str, Any] = {
        "weights": state.weights,
        "moments": state.moments,
        "averages": state.averages,
        "host": host,
    }
    d, summed = BYTES[fsdp.param_dtype], BYTES[fsdp.reduce_dtype]
    with as_sharded(model, args):
        found = units(model, shard_plan(config), fsdp)
    root, inner = found[-1], found[:-1]
    largest = max((unit.parameters for unit in inner), default=0)
    # Gathered: the root from forward to the end; of the others the present one and the next, unless they stay after forward.
    whole = d * (root.parameters + sum(u.parameters for u in inner if not u.reshard))
    in_use = d * 2 * largest if any(u.reshard for u in inner) else 0
    # Gradients of the unit that was last on its way back, whole, and the buffer in which they are summed.
    going = (d + summed) * max((u.trained for u in inner), default=0)

    vocabulary = config.llm.vocab_size * config.llm.hidden_size
    rows = min(block_size(config.llm.vocab_size, device_type), _filled(shape.labels, device_type))
    logits = rows * config.llm.vocab_size * (4 + d) if shape.labels else 0
    # Summed in float32; in bf16, a copy of it is what stays.
    learns = bool(shape.labels) and model.language_model.lm_head.weight.requires_grad
    ready = vocabulary * (4 if d == 4 else 4 + d) if learns else 0
    # In fp16 the float32 sum stays until it is scaled, and then a copy of it.
    projection = vocabulary * (4 + d if fsdp.param_dtype == "fp16" else d) if learns else 0
    stacks = _stacks(config, shape, args, device_type)
    ae = 4 * _parameters(autoencoder)
    accumulated = state.gradients if args.train.gradient_accumulation_steps > 1 else 0
    trunk = state.gradients - 4 * root.trained // shards
    moments = (
        PeakBytes(
            moment="encode",
            **kept,
            gradients=accumulated,
            autoencoder=ae + _feature_maps(autoencoder, shape.pictures),
        ),
        PeakBytes(
            moment="loss",
            **kept,
            gradients=accumulated,
            activations=stacks.kept,
            gathered=whole,
            logits=logits + ready,
            autoencoder=ae,
        ),
        PeakBytes(
            moment="turn",
            **kept,
            gradients=accumulated,
            activations=stacks.kept,
            gathered=whole + in_use,
            logits=projection,
            autoencoder=ae,
            passing=stacks.passing,
        ),
        PeakBytes(
            moment="trunk",
            **kept,
            gradients=max(accumulated, trunk),
            activations=stacks.at_the_bottom,
            gathered=whole + in_use + going,
            logits=projection,
            autoencoder=ae,
            passing=stacks.passing,
        ),
        PeakBytes(
            moment="end",
            **kept,
            gradients=max(accumulated, trunk),
            gathered=whole + (d + summed) * root.trained,
            autoencoder=ae,
        ),
        PeakBytes(moment="update", **kept, gradients=state.gradients, autoencoder=ae),
    )
    return max(moments, key=lambda m: m.total)


# --------------------------------------------------------------------------------------------------------- activations


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBytes:
    """What one layer keeps of a pack for its backward pass.

    Attributes:
        stream: what goes in.
        products: results of matrix products, which `selective` recomputation keeps.
        attention: what attention itself keeps.
        rest: norms and activations.
        passing: at most, beside all that, while the layer is on its way back.
    """

    stream: int
    products: int
    attention: int
    rest: int
    passing: int

    def kept(self, rerun: str) -> int:
        """For the backward pass, if so much of the layer is run again (`Layer.rerun`)."""
        if rerun == "full":
            return self.stream
        if rerun == "selective":
            return self.stream + self.products + self.attention
        return self.products + self.attention + self.rest


def decoder_layer_bytes(config: BagelConfig, shape: PackShape, d: int, device_type: str) -> LayerBytes:
    """Of a layer of the trunk; `d` is the size of a number in forward and backward."""
    llm = config.llm
    h, kv, inter = llm.hidden_size, llm.num_key_value_heads * llm.head_dim, llm.intermediate_size
    rows = _filled(shape.tokens - shape.latents, device_type) + _filled(shape.latents, device_type)
    # Norms compute in float32 and keep what went in so; their result is kept before and after it is weighted.
    norms = 2 * h * (4 + 2 * d)
    head_norms = (h + kv) * (4 + d) if llm.qk_norm else 0
    products = rows * d * (2 * h + 2 * kv + 3 * inter + h)
    attention, scores = _attention(
        shape.lengths, shape.behind, h, kv, llm.num_attention_heads, d, device_type
    )
    tables = 0 if d == 4 else 4 * llm.head_dim * d * shape.tokens  # of the rotation, cast in every layer
    # gate, up, silu(gate) and their product; what goes into the output projection.
    kept = rows * (norms + head_norms + d * (4 * inter + h)) + tables
    products = min(products, kept)
    return LayerBytes(
        stream=rows * d * h,
        products=rows * d * (2 * inter + 2 * h + 2 * kv),
        attention=attention,
        rest=kept - rows * d * (2 * inter + 2 * h + 2 * kv),
        passing=max(2 * d * inter * rows, 2 * scores - 4 * d * inter * rows) + d * h * rows,
    )


def tower_layer_bytes(config: BagelConfig, shape: PackShape, d: int, device_type: str) -> LayerBytes:
    """Of a layer of the vision tower."""
    vit = config.vit
    w, inter, rows = vit.hidden_size, vit.intermediate_size, shape.patches
    nobody = [(0, 0)] * len(shape.patch_lengths)
    attention, scores = _attention(shape.patch_lengths, nobody, w, w, vit.num_attention_heads, d, device_type)
    products = rows * d * (inter + 2 * w)
    return LayerBytes(
        stream=rows * d * w,
        products=products,
        attention=attention,
        rest=rows * d * (5 * w + 2 * inter) - products,
        passing=max(d * inter * rows, 2 * scores - 2 * d * inter * rows) + d * w * rows,
    )


def _attention(
    lengths: Sequence[int],
    behind: Sequence[tuple[int, int]],
    h: int,
    kv: int,
    heads: int,
    d: int,
    device_type: str,
) -> tuple[int, int]:
    """What attention keeps, and of that the scores, which only the CPU's way for short samples has."""
    if device_type != "cpu":
        return sum(lengths) * (d * (2 * h + 2 * kv) + 4 * heads), 0
    kept = scores = 0
    for n, (pairs, context) in zip(lengths, behind, strict=True):
        if n > BATCHED_UP_TO:
            # Keys and values are copied behind those before them; a causal split there takes a mask of numbers.
            kept += n * (d * (2 * h + 2 * kv) + 4 * heads) + d * (2 * kv * context + pairs)
        elif n:
            step = max(16, 1 << max(0, n.bit_length() - 3))
            padded = -(-n // step) * step
            # Queries, and keys and values once per query head; the scores; who sees whom.
            kept += 3 * d * h * padded + d * heads * padded**2 + padded**2
            scores += d * heads * padded**2
    return kept, scores


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stacks:
    """Kept by all layers; kept when the way back has come to the first layer of the trunk; needed by a layer on its way back."""

    kept: int
    at_the_bottom: int
    passing: int


def _stacks(config: BagelConfig, shape: PackShape, args: Args, device_type: str) -> _Stacks:
    """Both stacks of layers, and what lies around them."""
    d = BYTES[args.fsdp.param_dtype]
    trunk = decoder_layer_bytes(config, shape, d, device_type)
    tower = tower_layer_bytes(config, shape, d, device_type)

    def of(layer: Layer) -> LayerBytes:
        return trunk if layer.fqn.startswith("language_model") else tower

    stack = layers(shard_plan(config), args.fsdp)
    h, w = config.llm.hidden_size, config.vit.hidden_size
    rows = _filled(shape.tokens - shape.latents, device_type) + _filled(shape.latents, device_type)
    # The final norm, the packed states, those at labels with their gradient; patches in, and the connector.
    around = rows * h * (4 + 2 * d) + shape.tokens * h * d + 2 * shape.labels * h * d
    around += shape.patches * d * (3 * config.vit.patch_size**2 + 2 * w + 3 * h)
    last = stack[-1]
    # A layer that is run again has all of its activations while it is on its way back.
    again = of(last).kept("") - of(last).kept(last.rerun) if last.rerun else 0
    seen = sum(tower.kept(layer.rerun) for layer in stack if of(layer) is tower)
    return _Stacks(
        kept=around + sum(of(layer).kept(layer.rerun) for layer in stack),
        at_the_bottom=around + seen + trunk.kept(last.rerun),
        passing=of(last).passing + again,
    )


def _filled(count: int, device_type: str) -> int:
    return -(-count // BLOCK) * BLOCK if device_type == "cpu" and count >= BLOCK else count


# --------------------------------------------------------------------------------------------------------- autoencoder


def _parameters(config: AutoEncoderConfig) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in AutoEncoder(config).parameters())


def _feature_maps(config: AutoEncoderConfig, pictures: Sequence[tuple[int, int]]) -> int:
    """At most, while the largest group of pictures of one size is encoded: three maps at full resolution, float32."""
    groups = itertools.groupby(sorted(pictures))
    return max((len(list(same)) * h * w * (3 * config.ch + 3) * 4 for (h, w), same in groups), default=0)
