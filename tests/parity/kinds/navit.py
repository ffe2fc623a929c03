"""The vision tower alone, from weights with a convolution as patch embedding."""

import json
from pathlib import Path

from safetensors.torch import load_file

from modeling.ops.attention import AttentionPlan
from modeling.siglip.config import SiglipConfig
from modeling.siglip.model import SiglipVisionModel, linear_patch_embedding
from tests.parity.comparison import Comparison

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5


def run(folder: Path) -> Comparison:
    """The linear form of the embedding, the output, and the norm of every gradient."""
    model = SiglipVisionModel(SiglipConfig.from_json(json.loads((folder / "config.json").read_text())))
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    weights = load_file(folder / "weights_conv.safetensors")
    key = "vision_model.embeddings.patch_embedding.weight"
    weights[key] = linear_patch_embedding(weights[key])
    model.load_state_dict({k: v for k, v in weights.items() if ".rope." not in k})
    found = Comparison()
    for name, value in expected.items():
        if name.startswith("weights_linear/") and name.endswith(key):
            found.equal(name, weights[key], value)

    lens = json.loads((folder / "inputs.json").read_text())["seqlens"]
    plan = AttentionPlan.build(
        lens, lens, ["full"] * len(lens), [0] * len(lens), inputs["output_weights"].device
    )
    pixels, position = inputs["packed_pixel_values"], inputs["packed_flattened_position_ids"]
    out = model(pixels, position, tuple((1, n) for n in lens), plan)
    found.close("output", out, expected["output"], TOLERANCE)
    (out * inputs["output_weights"]).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for name, value in expected.items():
        kind, _, parameter = name.partition("/")
        if kind == "grad_norm":
            found.close(name, gradients[parameter].double().norm(), value.double(), GRADIENT_TOLERANCE)
    return found
