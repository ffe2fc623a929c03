"""The published system's forward, loss and gradients on tiny models, number by number.

Needs the golden folder beside the checkout; a clone without it runs `tests/parity/test_qwen2_reference.py` instead, which holds
the decoder against an independent implementation.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.types import PackedBatch
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.ops.flow import interpolate_path, shift_time, velocity_target
from modeling.ops.patch import patchify_latent
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig

GOLDEN = Path(__file__).parents[2].parent / "shared" / "golden" / "bagel"
CASES = sorted(p.name for p in GOLDEN.iterdir() if p.is_dir()) if GOLDEN.is_dir() else []
NOT_BUILT = {"13_vit_rope": "rotary positions of the ViT come with the fidelity issue"}
NO_VIT = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "patch_size": 14,
    "image_size": 112,
}  # fmt: skip
TOLERANCE = 1e-5  # worst seen 1.2e-6
GRADIENT_TOLERANCE = 5e-5  # worst seen 2.1e-6

pytestmark = pytest.mark.skipif(not CASES, reason="the golden folder is not beside this checkout")


def relative(ours: Tensor, theirs: Tensor) -> float:
    if not theirs.numel():
        return 0.0
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max().clamp(min=1e-30))


def load_case(name: str) -> tuple[Bagel, PackedBatch, dict[str, Tensor], dict[str, Any]]:
    config = json.loads((GOLDEN / name / "config.json").read_text())
    shape = json.loads((GOLDEN / name / "inputs.json").read_text())
    tensors = load_file(GOLDEN / name / "inputs.safetensors")
    weights = load_file(GOLDEN / name / "weights.safetensors")
    model = Bagel(
        BagelConfig(
            llm=Qwen2Config.from_json(config["llm_config"]),
            vit=SiglipConfig.from_json(config["vit_config"] or NO_VIT),
            latent_channels=(config["vae_config"] or {"z_channels": 4})["z_channels"],
            latent_patch_size=config["latent_patch_size"],
            max_latent_size=config["max_latent_size"],
            vit_max_num_patch_per_side=config["vit_max_num_patch_per_side"],
            connector_act=config["connector_act"],
            interpolate_pos=config["interpolate_pos"],
        )
    )
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    absent = model.load_state_dict(weights, strict=False)
    assert not absent.unexpected_keys
    switched_off = [k for k in absent.missing_keys if config["visual_gen"] and config["visual_und"]]
    assert not switched_off
    if config["frozen"]["freeze_llm"]:
        model.language_model.requires_grad_(False)
    if config["frozen"]["freeze_vit"]:
        model.vit_model.requires_grad_(False)
    return model, pack_of(tensors, shape, model.config), tensors, config


def pack_of(x: dict[str, Tensor], shape: dict[str, Any], config: BagelConfig) -> PackedBatch:
    none, patch = torch.zeros(0, dtype=torch.int64), config.vit.patch_size
    lens = x.get("vit_token_seqlens", none).tolist()
    return PackedBatch(
        text_ids=x["packed_text_ids"],
        text_index=x["packed_text_indexes"],
        position=x["packed_position_ids"],
        label_ids=x.get("packed_label_ids", none),
        label_index=x.get("ce_loss_indexes", none),
        label_weight=x.get("ce_loss_weights", torch.zeros(0)),
        und_patches=x.get("packed_vit_tokens", torch.zeros(0, 3 * patch**2)),
        und_position=x.get("packed_vit_position_ids", none),
        und_index=x.get("packed_vit_token_indexes", none),
        und_hw=torch.tensor([[1, n] for n in lens], dtype=torch.int64).reshape(-1, 2),
        gen_pixels=(),
        gen_hw=torch.tensor(shape.get("patchified_vae_latent_shapes", []), dtype=torch.int64).reshape(-1, 2),
        gen_position=x.get("packed_latent_position_ids", none),
        gen_index=x.get("packed_vae_token_indexes", none),
        gen_timestep=x.get("packed_timesteps", torch.zeros(0)).sigmoid(),
        gen_seed=none,
        gen_key=none,
        regions={},
        sample_lens=tuple(sum(s) for s in shape["per_sample_split_lens"]),
        split_lens=tuple(n for s in shape["per_sample_split_lens"] for n in s),
        split_modes=tuple(m for s in shape["per_sample_attn_modes"] for m in s),
        split_branches=tuple(0 for s in shape["per_sample_attn_modes"] for _ in s),
    )


@pytest.mark.parametrize("name", [c for c in CASES if c not in NOT_BUILT])
def test_forward_loss_and_gradients(name: str) -> None:
    model, batch, inputs, config = load_case(name)
    batch = replace(batch, gen_timestep=shift_time(batch.gen_timestep, config["timestep_shift"]))
    expected = load_file(GOLDEN / name / "expected.safetensors")
    p, z = model.config.latent_patch_size, model.config.latent_channels
    latents = [torch.zeros(0, p * p * z)]
    for padded, (rows, cols) in zip(inputs.get("padded_latent", []), batch.gen_hw.tolist(), strict=True):
        latents.append(patchify_latent(padded[:, : rows * p, : cols * p], p))
    clean = torch.cat(latents)
    noise = inputs.get("noise", torch.zeros(0, p * p * z))
    out = model(batch, interpolate_path(clean, noise, batch.gen_timestep))
    assert relative(out.hidden, expected["last_hidden_state"]) < TOLERANCE

    loss = torch.zeros(())
    if "ce" in expected:
        ce = torch.nn.functional.cross_entropy(out.logits, batch.label_ids, reduction="none")
        assert relative(out.logits, expected["ce_logits"]) < TOLERANCE
        assert relative(ce, expected["ce"]) < TOLERANCE
        loss = loss + ce.mean()
    if "mse" in expected:
        noised = batch.gen_timestep > 0
        mse = (out.velocity - velocity_target(clean, noise))[noised].square()
        assert relative(mse, expected["mse"]) < TOLERANCE
        loss = loss + mse.mean()
    assert loss.item() == pytest.approx(float(expected["loss"]), rel=1e-5)
    loss.backward()
    rounding = json.loads((GOLDEN / name / "expected.json").read_text()).get(
        "params_with_rounding_noise_grad", []
    )
    gradients = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
    compared = 0
    for key, value in expected.items():
        kind, _, parameter = key.partition("/")
        if parameter in rounding or kind not in ("grad", "grad_norm"):
            continue
        gradient = gradients.get(parameter, torch.zeros(()))
        if kind == "grad":
            assert relative(gradient, value) < GRADIENT_TOLERANCE, parameter
        else:
            assert float(gradient.double().norm()) == pytest.approx(float(value), rel=5e-5, abs=1e-6), (
                parameter
            )
        compared += 1
    assert compared > 20
