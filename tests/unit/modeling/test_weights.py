"""Published checkpoint layouts: what is read, what is handled, what is refused and how."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.build import build_model, load_model, starting_values, weights_kind
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig
from modeling.source import read_source
from modeling.weights import find_weights, open_weights
from tests.unit.modeling.published import (
    LAYOUTS,
    LLM,
    TABLES,
    VIT,
    Tensors,
    published_config,
    published_tensors,
    write_bagel,
    write_json,
    write_unimedvl,
)


@pytest.fixture
def tensors() -> Tensors:
    """Weights as a published directory holds them."""
    return published_tensors()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Configurations as published: no bagel_config.json, one layer too many in vit_config.json."""
    write_json(tmp_path / "llm_config.json", LLM)
    write_json(tmp_path / "vit_config.json", {**VIT, "num_hidden_layers": 3})
    write_json(tmp_path / "ae_config.json", AutoEncoderConfig(z_channels=4).to_json())
    return tmp_path


# --------------------------------------------------------------------------------------------- layouts, whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_published_directory_loads_whole(
    tmp_path: Path, tensors: Tensors, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Show 4: full coverage, part by part, whatever the layout counts, wraps, copies and calls by other names."""
    LAYOUTS[layout](tmp_path, tensors)
    with caplog.at_level("INFO"):
        model = load_model(tmp_path)
    assert model.config == published_config()
    for name, value in model.state_dict().items():
        if "pos_embed.pos_embed" not in name:
            expected = tensors[name].bfloat16().float() if layout == "BAGEL" else tensors[name]
            assert torch.equal(value, expected), name
    for part, count in {
        "language_model": 31,
        "language_model (gen)": 29,
        "vit_model": 37,
        "connector": 4,
    }.items():
        line = f"ema.safetensors: {part}: {count} of {count} tensors loaded, 0 in the file not used"
        assert line in caplog.text, caplog.text
    assert len(load_autoencoder(tmp_path).state_dict()) > 50
    kept = "as many as vit_config.json counts; published loaders build one less and drop the last"
    assert (kept in caplog.text) == (layout != "BAGEL")


def test_the_kinds_of_weights_of_a_published_directory(tmp_path: Path, tensors: Tensors) -> None:
    bagel, unimedvl = tmp_path / "bagel", tmp_path / "unimedvl"
    for folder, write in ((bagel, write_bagel), (unimedvl, write_unimedvl)):
        folder.mkdir()
        write(folder, tensors)
    assert (
        find_weights(bagel, "model") == bagel / "model.safetensors.index.json"
    )  # the same tensors, and the autoencoder's
    key = "language_model.model.norm.weight"
    last = dict(load_model(unimedvl, "model").named_parameters())
    assert torch.equal(last[key], tensors[key] + 1)
    (unimedvl / "model.safetensors").unlink()  # what is left under that name is a map of components
    assert find_weights(unimedvl, "model") is None
    assert weights_kind(unimedvl, prefer_ema=False) == "ema"


def test_the_autoencoder_in_an_index_is_not_spoken_of(
    tmp_path: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    write_bagel(tmp_path, tensors)
    weights = open_weights(tmp_path / "model.safetensors.index.json")
    assert len(load_file(tmp_path / "ae.safetensors")) > 50
    assert weights.shapes.keys() == {k for k in tensors if "pos_embed.pos_embed" not in k}
    with caplog.at_level("INFO"):
        load_model(tmp_path, "model")
    told = [record.message for record in caplog.records if "tensors loaded" in record.message]
    assert len(told) > 4 and all("0 in the file not used" in line for line in told), told


def shards(folder: Path, tensors: Tensors) -> None:
    names = sorted(tensors)
    parts = {f"ema-0000{i + 1}-of-00002.safetensors": names[i::2] for i in range(2)}
    for file, keys in parts.items():
        save_file({k: tensors[k] for k in keys}, folder / file)
    index = {"weight_map": {k: file for file, keys in parts.items() for k in keys}}
    write_json(folder / "ema.safetensors.index.json", index)


FORMS: dict[str, Callable[[Path, Tensors], None]] = {
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
    "without tables": lambda folder, t: save_file(
        {k: v for k, v in t.items() if "pos_embed." not in k}, folder / "ema.safetensors"
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_weights_loads_whole(folder: Path, tensors: Tensors, form: str) -> None:
    FORMS[form](folder, tensors)
    model = load_model(folder)
    assert model.config.vit.num_hidden_layers == 2
    sides = (6, 8) if form != "without tables" else (64, 70)
    assert (model.config.max_latent_size, model.config.vit_max_num_patch_per_side) == sides
    assert model.config.layout.latent_positions_per_side == sides[0]
    for name, value in model.state_dict().items():
        if "pos_embed.pos_embed" not in name:
            expected = tensors[name].bfloat16().float() if form == "bf16" else tensors[name]
            assert torch.equal(value, expected), name


def test_a_model_can_be_loaded_in_bf16(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "ema.safetensors")
    loaded = load_model(folder, dtype=torch.bfloat16).state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.bfloat16}
    assert torch.equal(loaded["vae2llm.weight"], tensors["vae2llm.weight"].bfloat16())


def test_coverage_is_told_by_component(
    folder: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    save_file({**tensors, "head.extra": torch.zeros(1)}, folder / "ema.safetensors")
    with caplog.at_level("INFO"):
        load_model(folder)
    assert "ema.safetensors: connector: 4 of 4 tensors loaded, 0 in the file not used" in caplog.text
    assert "ema.safetensors: head: 0 of 0 tensors loaded, 1 in the file not used" in caplog.text


@pytest.mark.parametrize("layer", ["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"])
@pytest.mark.parametrize("qk_norm", [True, False])
def test_what_the_files_leave_open_the_weights_show(folder: Path, layer: str, qk_norm: bool) -> None:
    config = published_config(layer_module=layer, qk_norm=qk_norm)
    save_file(published_tensors(config), folder / "ema.safetensors")
    assert load_model(folder).config == config


def test_the_weights_of_a_published_directory_overrule_its_files(
    folder: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    """Published loaders force experts, head norms, an untied output layer and learned positions, whatever the files say."""
    save_file(tensors, folder / "ema.safetensors")
    says = {"layer_module": "Qwen2DecoderLayer", "qk_norm": False, "tie_word_embeddings": True}
    write_json(folder / "llm_config.json", {**LLM, **says})
    write_json(folder / "vit_config.json", {**VIT, "num_hidden_layers": 3, "rope": True})
    with caplog.at_level("INFO"):
        assert load_model(folder).config == published_config()
    for key in (*says, "rope"):
        assert f"_config.json: {key} says" in caplog.text


def test_rotary_tables_of_the_tower_show_that_it_is_rotary(folder: Path, tensors: Tensors) -> None:
    """The published trainer keeps them in the weights, and nothing in the directory's files says it."""
    tower = "vit_model.vision_model."
    change = {f"{tower}rope.{table}": torch.zeros(8, 2) for table in ("cos_h", "sin_h", "cos_w", "sin_w")}
    held = {k: v for k, v in tensors.items() if "position_embedding" not in k}
    save_file({**held, **change}, folder / "ema.safetensors")
    assert load_model(folder).config.vit.rope


# --------------------------------------------------------------------------------------------- what is refused


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


@pytest.mark.parametrize("name", ["ema.safetensors", "ae.safetensors"])
def test_a_pointer_of_git_lfs_is_known_as_what_it_is(tmp_path: Path, tensors: Tensors, name: str) -> None:
    write_bagel(tmp_path, tensors)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / name).write_text(
        f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9\n"
    )
    with pytest.raises(
        ValueError,
        match=f"{name}: is a git-lfs pointer that stands for the weights; run `git lfs pull` in {tmp_path}",
    ):
        load_model(tmp_path)
        load_autoencoder(tmp_path)


@pytest.mark.parametrize(
    "key",
    ["language_model.lm_head.weight", "vit_model.vision_model.embeddings.position_embedding.weight"],
)
def test_a_missing_tensor_is_no_other_model(folder: Path, tensors: Tensors, key: str) -> None:
    """Files that are silent about tying and rotation mean the published model, which has both tensors."""
    save_file({k: v for k, v in tensors.items() if k != key}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=f"1 tensors missing, 0 of another shape: lacks {key}$"):
        load_model(folder)


def test_more_decoder_layers_than_counted_are_refused(folder: Path, tensors: Tensors) -> None:
    more = {
        k.replace("layers.1.", "layers.2."): v.clone() for k, v in tensors.items() if "model.layers.1." in k
    }
    save_file({**tensors, **more}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match="holds 3 layers of the language model; .* num_hidden_layers 2"):
        load_model(folder)


def without_last_layer(tensors: Tensors) -> Tensors:
    return {k: v for k, v in tensors.items() if ".encoder.layers.1." not in k}


DEPTHS: dict[str, tuple[int, dict[str, int] | None, Callable[[Tensors], Tensors], int | str]] = {
    # num_hidden_layers, bagel_config.json, change of the weights (of two layers) -> layers, or what is said
    "published": (3, None, dict, 2),
    "counted as built": (2, None, dict, 2),
    "cut short": (
        3,
        None,
        without_last_layer,
        "holds 1 layers .* num_hidden_layers 3, for which 2 or 3 are expected",
    ),
    "counted one too long": (
        4,
        None,
        dict,
        "holds 2 layers .* num_hidden_layers 4, for which 3 or 4 are expected",
    ),
    "ours": (2, {}, dict, 2),
    "ours, cut short": (
        2,
        {},
        without_last_layer,
        "holds 1 layers .* num_hidden_layers 2, for which 2 are expected",
    ),
    "ours, counted one too long": (
        3,
        {},
        dict,
        "holds 2 layers .* num_hidden_layers 3, for which 3 are expected",
    ),
    "exported": (3, {"vit_select_layer": -2}, dict, 2),
    "exported, cut short": (
        3,
        {"vit_select_layer": -2},
        without_last_layer,
        "holds 1 layers .* for which 2 are expected",
    ),
}


@pytest.mark.parametrize("case", DEPTHS)
def test_the_depth_of_the_tower(folder: Path, tensors: Tensors, case: str) -> None:
    """Show 4: one rule, and a tower that does not follow it is refused by both numbers."""
    counted, own, edit, expected = DEPTHS[case]
    write_json(folder / "vit_config.json", {**VIT, "num_hidden_layers": counted})
    if own is not None:
        write_json(folder / "bagel_config.json", {**TABLES, **own})
    save_file(edit(tensors), folder / "ema.safetensors")
    if isinstance(expected, int):
        assert load_model(folder).config.vit.num_hidden_layers == expected
        return
    with pytest.raises(ValueError, match=f"ema.safetensors: {expected}") as error:
        load_model(folder)
    assert "vit_config.json" in str(error.value) and "\n" not in str(error.value)


def test_a_layer_missing_in_the_middle_is_named(folder: Path, tensors: Tensors) -> None:
    save_file({k: v for k, v in tensors.items() if ".encoder.layers.0." not in k}, folder / "ema.safetensors")
    with pytest.raises(
        ValueError, match=r"16 tensors missing, .* lacks vit_model.vision_model.encoder.layers.0."
    ):
        load_model(folder)


@pytest.mark.parametrize("shape", [(35, 32), (36, 30)])
def test_a_table_that_is_none_is_refused(folder: Path, tensors: Tensors, shape: tuple[int, int]) -> None:
    save_file({**tensors, "latent_pos_embed.pos_embed": torch.zeros(shape)}, folder / "ema.safetensors")
    with pytest.raises(
        ValueError,
        match=r"latent_pos_embed.pos_embed is \[3., 3.\]; a table of positions has side x side rows",
    ):
        load_model(folder)


def test_our_own_directories_may_change_the_size_of_the_tables(
    folder: Path, tensors: Tensors, caplog: pytest.LogCaptureFixture
) -> None:
    write_json(folder / "vit_config.json", VIT)
    write_json(folder / "bagel_config.json", {**TABLES, "max_latent_size": 9})
    save_file(tensors, folder / "ema.safetensors")
    with caplog.at_level("INFO"):
        model = load_model(folder)
    assert model.latent_pos_embed.pos_embed.shape == (81, 32)
    small = tensors["latent_pos_embed.pos_embed"].view(6, 6, 32)
    assert torch.equal(model.latent_pos_embed.pos_embed.view(9, 9, 32)[:6, :6], small)
    assert "max_latent_size is 9, the weights were trained with 6" in caplog.text


@pytest.mark.parametrize(
    ("file", "key"), [("llm", "hidden_size"), ("vit", "num_hidden_layers"), ("vit", "patch_size")]
)
def test_a_configuration_that_lacks_a_key_is_named(
    folder: Path, tensors: Tensors, file: str, key: str
) -> None:
    save_file(tensors, folder / "ema.safetensors")
    values = json.loads((folder / f"{file}_config.json").read_text())
    write_json(folder / f"{file}_config.json", {k: v for k, v in values.items() if k != key})
    with pytest.raises(ValueError, match=f"lacks .*{key}"):
        load_model(folder)


def test_a_missing_expert_is_no_smaller_model(folder: Path, tensors: Tensors) -> None:
    """The file says MoT: weights without the generation expert are incomplete, and not those of another model."""
    write_json(folder / "llm_config.json", {**LLM, "layer_module": "Qwen2MoTDecoderLayer"})
    save_file({k: v for k, v in tensors.items() if "_moe_gen" not in k}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match="ema.safetensors: 29 tensors missing"):
        load_model(folder)


def test_numbers_that_are_no_weights_are_refused(folder: Path, tensors: Tensors) -> None:
    save_file({**tensors, "vae2llm.bias": torch.zeros(32, dtype=torch.int64)}, folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"vae2llm\.bias is in a number format that weights do not have"):
        load_model(folder)


def test_the_other_kind_of_weights_is_named(folder: Path, tensors: Tensors) -> None:
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ValueError, match="ema.safetensors: is not there; .* of the kind `model`, ask for those"
    ):
        load_model(folder)


def test_a_directory_without_weights_is_refused_unless_said(folder: Path) -> None:
    source = read_source(folder)
    with pytest.raises(
        ValueError, match=r"model\.safetensors: no weights here; .* ask for --from_scratch True"
    ):
        starting_values(source, build_model(source.config), weights="model", seed=0)


def test_a_missing_shard_is_named(folder: Path, tensors: Tensors) -> None:
    shards(folder, tensors)
    (folder / "ema-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="names ema-00002-of-00002.safetensors, which is not there; 1 of 2"):
        load_model(folder)


def test_the_published_autoencoder_has_the_published_tensors() -> None:
    with torch.device("meta"):
        state = AutoEncoder(AutoEncoderConfig()).state_dict()
    assert len(state) == 244
    assert sum(t.numel() for t in state.values()) == 83_819_683
    shapes = {
        "encoder.conv_in.weight": [128, 3, 3, 3],
        "encoder.down.1.block.0.nin_shortcut.weight": [256, 128, 1, 1],
        "encoder.down.2.downsample.conv.weight": [512, 512, 3, 3],
        "encoder.mid.attn_1.proj_out.weight": [512, 512, 1, 1],
        "encoder.conv_out.weight": [32, 512, 3, 3],
        "decoder.conv_in.weight": [512, 16, 3, 3],
        "decoder.up.3.block.2.conv2.weight": [512, 512, 3, 3],
        "decoder.up.1.upsample.conv.bias": [256],
        "decoder.norm_out.weight": [128],
        "decoder.conv_out.weight": [3, 128, 3, 3],
    }
    assert {k: list(state[k].shape) for k in shapes} == shapes
    assert not [k for k in state if k.startswith(("encoder.down.3.downsample", "decoder.up.0.upsample"))]


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
