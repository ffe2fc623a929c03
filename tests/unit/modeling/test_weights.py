"""Published checkpoint layouts: what is read, what is handled, what is refused and how."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.build import load_model
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig

LLM = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 40,
}  # fmt: skip
VIT = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8,
    "image_size": 64,
}  # fmt: skip
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def tensors() -> Tensors:
    """Weights as a published directory holds them."""
    torch.manual_seed(0)
    config = BagelConfig(
        llm=Qwen2Config.from_json(LLM),
        vit=SiglipConfig.from_json(VIT),
        max_latent_size=6,
        vit_max_num_patch_per_side=8,
    )
    return {k: torch.randn_like(v) for k, v in Bagel(config).state_dict().items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configurations as published: no bagel_config.json, one layer too many in vit_config.json."""
    (tmp_path / "llm_config.json").write_text(json.dumps(LLM))
    (tmp_path / "vit_config.json").write_text(json.dumps({**VIT, "num_hidden_layers": 3}))
    return tmp_path


def shards(folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    parts = {f"ema-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    (folder / "ema.safetensors.index.json").write_text(json.dumps(index))


LAYOUTS: dict[str, Callable[[Path, Tensors], None]] = {
    "one file": lambda folder, t: save_file(t, folder / "ema.safetensors"),
    "shards": shards,
    "bf16": lambda folder, t: save_file(
        {k: v.bfloat16() for k, v in t.items()}, folder / "ema_bf16.safetensors"
    ),
    "wrapped": lambda folder, t: save_file(
        {f"module.bagel.{k}": v for k, v in t.items()}, folder / "ema.safetensors"
    ),
    "with a VAE": lambda folder, t: save_file(
        {**t, "vae_model.encoder.conv_in.weight": torch.zeros(2)}, folder / "ema.safetensors"
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_layout_loads_whole(folder: Path, tensors: Tensors, layout: str) -> None:
    LAYOUTS[layout](folder, tensors)
    model = load_model(folder)
    assert model.config.vit.num_hidden_layers == 2
    assert (model.config.max_latent_size, model.config.vit_max_num_patch_per_side) == (6, 8)
    assert model.config.layout.latent_positions_per_side == 6
    for name, value in model.state_dict().items():
        if "pos_embed.pos_embed" not in name:
            expected = tensors[name].bfloat16().float() if layout == "bf16" else tensors[name]
            assert torch.equal(value, expected), name


def test_coverage_is_told_by_component(
    folder: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**tensors, "head.extra": torch.zeros(1)}, folder / "ema.safetensors")
    with caplog.at_level("INFO"):
        load_model(folder)
    assert "ema.safetensors: connector: 4 of 4 tensors loaded, 0 in the file not used" in caplog.text
    assert "ema.safetensors: head: 0 of 0 tensors loaded, 1 in the file not used" in caplog.text


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    held = load_file(folder / "ema.safetensors")
    edit(held)
    save_file(held, folder / "ema.safetensors")


def test_what_does_not_fit_is_named(folder: Path, tensors: Tensors) -> None:
    key = "language_model.model.layers.1.mlp.up_proj.weight"
    save_file(tensors, folder / "ema.safetensors")
    change(folder, lambda t: t.pop(key))
    with pytest.raises(
        ValueError, match=rf"ema.safetensors: 1 tensors missing, 0 of another shape: lacks {key}$"
    ):
        load_model(folder)
    change(folder, lambda t: t.update({key.replace("up_proj", "upproj"): tensors[key]}))
    with pytest.raises(
        ValueError, match=r"lacks .*up_proj.weight \(it has .*upproj.weight, which nothing uses\)"
    ):
        load_model(folder)
    change(folder, lambda t: t.update({key: tensors[key].T.contiguous()}))
    with pytest.raises(
        ValueError,
        match=r"0 tensors missing, 1 of another shape: .* is \[32, 48\], the configuration says \[48, 32\]",
    ):
        load_model(folder)


def test_a_tower_cut_short_is_refused_where_the_configuration_counts_right(
    folder: Path, tensors: Tensors
) -> None:
    (folder / "bagel_config.json").write_text(
        json.dumps({"max_latent_size": 6, "vit_max_num_patch_per_side": 8})
    )
    save_file(tensors, folder / "ema.safetensors")  # two layers, vit_config.json says three
    with pytest.raises(
        ValueError,
        match=r"ema.safetensors: holds 2 layers of the vision tower; .* 3, for which 3 are expected",
    ):
        load_model(folder)


def test_a_missing_shard_is_named(folder: Path, tensors: Tensors) -> None:
    shards(folder, tensors)
    (folder / "ema-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="names ema-00002-of-00002.safetensors, which is not there; 1 of 2"):
        load_model(folder)


def test_the_published_model_has_the_published_tensors() -> None:
    """Counts of facts: 28 decoder layers and 26 of the tower."""
    llm = {
        "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
        "num_key_value_heads": 4, "vocab_size": 152064,
    }  # fmt: skip
    vit = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 26, "num_attention_heads": 16, "patch_size": 14,
        "image_size": 980,
    }  # fmt: skip
    with torch.device("meta"):
        state = Bagel(
            BagelConfig(llm=Qwen2Config.from_json(llm), vit=SiglipConfig.from_json(vit))
        ).state_dict()
    assert len(state) == 1223
    assert sum(t.numel() for t in state.values()) == 14_607_260_128
    parts = {
        "language_model.": 14_141_252_608,
        "vit_model.": 402_552_736,
        "connector.": 16_980_992,
        "time_embedder.": 13_769_728,
    }
    for prefix, count in parts.items():
        assert sum(t.numel() for k, t in state.items() if k.startswith(prefix)) == count, prefix
    assert sum(t.numel() for k, t in state.items() if "_moe_gen" in k) == 6_525_628_928
    shapes = {
        "language_model.model.layers.27.self_attn.k_proj_moe_gen.bias": [512],
        "language_model.model.layers.0.self_attn.q_norm.weight": [128],
        "language_model.model.norm_moe_gen.weight": [3584],
        "time_embedder.mlp.0.weight": [3584, 256],
        "llm2vae.weight": [64, 3584],
        "latent_pos_embed.pos_embed": [4096, 3584],
        "vit_pos_embed.pos_embed": [4900, 3584],
        "vit_model.vision_model.embeddings.patch_embedding.weight": [1152, 588],
        "vit_model.vision_model.encoder.layers.25.self_attn.out_proj.weight": [1152, 1152],
    }
    assert {k: list(state[k].shape) for k in shapes} == shapes
