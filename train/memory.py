"""Bytes of what a run keeps on every rank all the time: weights, gradients, moments, averages. What comes and goes (activations,
gathered units) is not in here.

Counted from the configuration alone, on the meta device: neither weights nor PEFT nor bitsandbytes are needed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from torch import nn

from modeling.adapters import target_pattern
from modeling.bagel.bagel import Bagel
from modeling.quantised import DTYPES, Precision
from train.args import Args
from train.param_manager import by_muon, frozen_groups, group_of


@dataclass(frozen=True, slots=True, kw_only=True)
class StateBytes:
    """What a run keeps, on one rank.

    Attributes:
        trained, frozen, few_bits: numbers of all ranks together; those in few bits are frozen too, and counted apart.
        adapters: of the trained ones, those of adapters.
        weights, gradients, moments, averages: bytes per rank. Weights in few bits are whole on every rank, all else is divided.
        weights_few_bits: of the weights, those in few bits: they stay where the rank computes, with --cpu_offload too.
    """

    trained: int
    frozen: int
    few_bits: int
    adapters: int
    weights: int
    gradients: int
    moments: int
    averages: int
    weights_few_bits: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """All summands by name."""
        return {name: getattr(self, name) for name in ("weights", "gradients", "moments", "averages")}

    def offloaded(self) -> tuple["StateBytes", dict[str, int]]:
        """With `--cpu_offload`: what stays on the GPU, and the parts of what lies in host memory."""
        stays = replace(self, weights=self.weights_few_bits, gradients=0, moments=0, averages=0)
        return stays, {name: value - stays.parts()[name] for name, value in self.parts().items()}

    def averages_offloaded(self) -> tuple["StateBytes", dict[str, int]]:
        """With `--ema_on_cpu`: likewise; the weights are copied there to be averaged."""
        return replace(self, averages=0), {"averages": self.averages, "copies": self.averages}


def state_bytes(model: Bagel, args: Args, shards: int = 1) -> StateBytes:
    """Count a run's state.

    Args:
        model: plain, on the meta device.
        args: all flags.
        shards: ranks that share one copy.

    Raises:
        ValueError: if flags name matrices or groups that there are not.
    """
    lora, still = args.lora, frozen_groups(args.params, args.optim.lr)
    adapters = few_bits = 0
    bytes_few_bits = 0
    if args.params.lora_enable:
        for layer in _layers(model, lora.lora_target, "--lora_target"):
            adapters += lora.lora_r * (layer.in_features + layer.out_features)
        if lora.bits:
            kind = Precision(bits=lora.bits, pattern="", double=lora.bnb_4bit_use_double_quant)
            for layer in _layers(model, lora.quant_target, "--quant_target"):
                few_bits += layer.weight.numel()
                bytes_few_bits += kind.bytes_of(layer.out_features, layer.in_features)
    trained, frozen, second_moments = adapters, -few_bits, adapters
    for name, p in model.named_parameters():
        if p.requires_grad and group_of(name) not in still:
            trained += p.numel()
            second_moments += 0 if args.optim.optimizer == "muon" and by_muon(name, p) else p.numel()
        else:
            frozen += p.numel()
    kept = trained * 4 + frozen * DTYPES[args.params.frozen_dtype].itemsize
    return StateBytes(
        trained=trained,
        frozen=frozen,
        few_bits=few_bits,
        adapters=adapters,
        weights=kept // shards + bytes_few_bits,
        gradients=trained * 4 // shards,
        moments=(trained + second_moments) * 4 // shards,
        averages=trained * 4 // shards,
        weights_few_bits=bytes_few_bits,
    )


@contextmanager
def as_sharded(model: Bagel, args: Args) -> Iterator[None]:
    """For the time of the block, a plain model on the meta device without the matrices that sharding does not see."""
    on = args.params.lora_enable and args.lora.bits
    layers = _layers(model, args.lora.quant_target, "--quant_target") if on else []
    held = [layer.get_parameter("weight") for layer in layers]
    for layer in layers:
        layer.register_parameter("weight", None)
    try:
        yield
    finally:
        for layer, weight in zip(layers, held, strict=True):
            layer.register_parameter("weight", weight)


def _layers(model: Bagel, names: str, flag: str) -> list[nn.Linear]:
    pattern = target_pattern(model, names, flag)
    return [
        m
        for n, m in model.named_modules()
        if isinstance(m, nn.Linear) and re.fullmatch(pattern, n) is not None
    ]
