"""How much of what the devices can do is used: model FLOPs over time and peak (MFU)."""

from collections.abc import Callable
from dataclasses import replace

from data.types import PackedBatch
from modeling.bagel.bagel import Bagel
from modeling.bagel.flops import FROZEN, PASSED, TRAINED, PackShape, Passes, step_flops
from modeling.bagel.latents import LatentEncoder
from train.param_manager import group_of

PEAK_TFLOPS = {
    "MI300X": 1336.0,
    "H200": 989.0,
    "H100": 989.0,
    "H800": 989.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40": 181.05,
    "L20": 119.5,
    "H20": 148.0,
    "910B": 354.0,
    "3070 Ti": 21.75,
}
"""Part of a device's name -> dense bf16 TFLOP/s, as the published trainer has them."""


def peak_tflops(device_name: str, given: float = 0.0) -> float:
    """Peak of one device.

    Args:
        device_name: as the driver tells it; empty on a CPU.
        given: `--peak_device_tflops`; 0: by the name.

    Returns:
        0 if it is not known.
    """
    if given:
        return given
    # The longest part that fits: "H20" is in "H200" too.
    fitting = [part for part in PEAK_TFLOPS if part in device_name]
    return PEAK_TFLOPS[max(fitting, key=len)] if fitting else 0.0


def passes_of(model: Bagel) -> Passes:
    """How often a model's products are needed, by what of it is trained.

    Gradients pass a frozen trunk to what is below it and to its adapters; below the connector there is the tower alone.
    """
    groups = {group_of(name) for name, p in model.named_parameters() if p.requires_grad}
    names = [name for name, p in model.named_parameters() if p.requires_grad and "vit_model" in name]

    def trunk(group: str) -> int:
        return TRAINED if group in groups else PASSED

    # Adapters on a frozen tower need the gradient of what goes in.
    tower = TRAINED if "vit" in groups else PASSED if names else FROZEN
    return Passes(
        und=FROZEN if model.config.llm.freeze_und else trunk("llm_und"),
        gen=trunk("llm_gen" if model.config.llm.experts else "llm_und"),
        vocabulary=trunk("embeddings"),
        flow=trunk("flow"),
        vit=tower,
        connector=TRAINED if "connector" in groups else FROZEN if tower == FROZEN else PASSED,
    )


def pack_flops(model: Bagel, encoder: LatentEncoder) -> Callable[[PackedBatch], float]:
    """What training on a pack needs, as a function of the pack: pictures whose latents are in the cache are not encoded."""
    passes = passes_of(model)

    def flops(batch: PackedBatch) -> float:
        sizes = tuple((int(p.shape[1]), int(p.shape[2])) for p in encoder.missing(batch).values())
        shape = replace(PackShape.of(batch), pictures=sizes)
        return step_flops(model.config, shape, passes, encoder.vae.config)

    return flops
