"""Small model directories in the published layouts, made here: nothing of a published model is in them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, save_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.init import fixed_tables
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig
from scripts.data.make_quickstart_model import train_tokenizer

LLM = {
    "model_type": "qwen2", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 320, "hidden_act": "silu", "rope_theta": 1e6,
}  # fmt: skip
VIT = {
    "model_type": "siglip_vision_model", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "patch_size": 8, "image_size": 64,
}  # fmt: skip
TABLES = {"max_latent_size": 6, "vit_max_num_patch_per_side": 8}
AUTOENCODER = AutoEncoderConfig(
    ch=8,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    z_channels=4,
    num_groups=4,
    resolution=64,
    scale_factor=1.5,
    shift_factor=0.1,
)
Tensors = dict[str, torch.Tensor]


def published_config(**llm: object) -> BagelConfig:
    """What the directories describe."""
    return BagelConfig(
        llm=Qwen2Config.from_json({**LLM, **llm}),
        vit=SiglipConfig.from_json(VIT),
        latent_channels=4,
        **TABLES,
    )


def published_tensors(config: BagelConfig | None = None, seed: int = 0) -> Tensors:
    """Random weights under the published names; the position tables are the true ones."""
    generator = torch.Generator().manual_seed(seed)
    model = Bagel(config or published_config())
    tables = fixed_tables(model.config)
    return {
        k: tables.get(k, 0.2 * torch.randn(v.shape, generator=generator))
        for k, v in model.state_dict().items()
    }


def write_tokenizer(folder: Path) -> None:
    train_tokenizer(iter(["what is here a red 7 and two more"] * 3), 20).save(str(folder / "tokenizer.json"))


def write_autoencoder(folder: Path) -> None:
    torch.manual_seed(1)
    save_autoencoder(AutoEncoder(AUTOENCODER), folder)


def write_json(file: Path, values: object) -> None:
    file.write_text(json.dumps(values))


def write_bagel(folder: Path, tensors: Tensors) -> None:
    """BAGEL-7B-MoT: bf16 weights, a map of both files under the other kind's name, a tower counted one too long."""
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "ema.safetensors")
    write_autoencoder(folder)
    write_tokenizer(folder)
    write_json(folder / "llm_config.json", LLM)
    write_json(folder / "vit_config.json", {**VIT, "num_hidden_layers": 3})
    write_json(folder / "config.json", {"model_type": "bagel"})
    write_json(folder / "generation_config.json", {"do_sample": True})
    places = {**dict.fromkeys(tensors, "ema.safetensors"), "encoder.conv_in.weight": "ae.safetensors"}
    write_json(folder / "model.safetensors.index.json", {"weight_map": places})


def write_unimedvl(folder: Path, tensors: Tensors) -> None:
    """A step of UniMedVL's trainer: fp32, both kinds, the autoencoder under its other name and behind a wrapper's prefix, parts
    once more in files of their own, an index of components, a tower counted as it was built.
    """
    save_file(tensors, folder / "ema.safetensors")
    save_file(
        {k: v + 1 if "pos_embed." not in k else v for k, v in tensors.items()}, folder / "model.safetensors"
    )
    write_autoencoder(folder)
    vae = load_file(folder / "ae.safetensors")
    save_file({f"module.{k}": v for k, v in vae.items()}, folder / "vae_model.safetensors")
    (folder / "ae.safetensors").unlink()
    write_tokenizer(folder)
    write_json(folder / "llm_config.json", {**LLM, "layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True})
    write_json(folder / "vit_config.json", {**VIT, "rope": False})
    write_json(folder / "config.json", {"model_config": {}, "model_args": {}, "data_args": {}})
    parts = {"language_model.": "language_model.safetensors", "vit_model.": "vit_model.safetensors"}
    for prefix, file in parts.items():
        save_file(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, folder / file
        )
    write_json(folder / "model.safetensors.index.json", {"weight_map": {p[:-1]: f for p, f in parts.items()}})


def write_medq(folder: Path, tensors: Tensors) -> None:
    """A step of MedQ-Uni's trainer as its inference leaves it: bf16 copies beside, wrapped keys, the autoencoder inside too."""
    write_unimedvl(folder, tensors)
    inside = {
        "vae_model.encoder.conv_in.weight": torch.zeros(2),
        "vae_model.num_batches": torch.zeros((), dtype=torch.int64),
    }
    save_file({**{f"module.{k}": v for k, v in tensors.items()}, **inside}, folder / "ema.safetensors")
    save_file({k: v.bfloat16() for k, v in tensors.items()}, folder / "ema_bf16.safetensors")


LAYOUTS = {"BAGEL": write_bagel, "UniMedVL": write_unimedvl, "MedQ": write_medq}
