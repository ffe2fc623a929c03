"""Fresh models around Hugging Face directories: what is loaded, copied, left out and refused. Written by transformers itself."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data.layout import LayoutSpec
from data.packing import pack
from data.types import Sample, Segment
from modeling.bagel.bagel import Bagel
from modeling.build import build_model, fill_model, starting_values
from modeling.source import ModelSource, read_source
from modeling.types import FlowState
from tests.unit.modeling.published import LLM, TABLES, VIT, published_tensors, write_autoencoder, write_json
from tests.unit.modeling.tiny import SPECIAL

QWEN = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 96, "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 5e4},
}  # fmt: skip
SIGLIP = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 8,
    "image_size": 48,
}  # fmt: skip
TOLERANCE = 1e-5


class Given:
    """Directories as `save_pretrained` writes them, and the models they are of."""

    def __init__(self, root: Path):
        from transformers import (
            Qwen2Config,
            Qwen2ForCausalLM,
            SiglipConfig,
            SiglipModel,
            SiglipVisionConfig,
            SiglipVisionModel,
        )

        torch.manual_seed(0)
        eager = {"attn_implementation": "eager"}
        self.llm = Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=False, **eager))
        self.tied = Qwen2ForCausalLM(Qwen2Config(**QWEN, tie_word_embeddings=True, **eager))
        self.vit = SiglipVisionModel(SiglipVisionConfig(**SIGLIP, **eager))
        text = {
            "hidden_size": 24,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "vocab_size": 9,
        }
        self.pair = SiglipModel(SiglipConfig(vision_config=SIGLIP, text_config=text))
        for name in ("llm", "tied", "vit", "pair"):
            model = getattr(self, name).eval().requires_grad_(False)
            for p in model.parameters():
                p.normal_(std=0.2)
            model.save_pretrained(root / name)
        write_autoencoder(root)
        self.root = root

    def __getitem__(self, name: str) -> Path:
        return self.root / name


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Given:
    return Given(tmp_path_factory.mktemp("hf"))


def fresh(given: Given, llm: str = "llm", vit: str = "vit", **rest: object) -> ModelSource:
    copy_init_moe = rest.pop("copy_init_moe", None)
    return read_source(
        "nowhere",
        llm_path=given[llm],
        vit_path=given[vit],
        vae_path=given.root,
        from_scratch=True,
        copy_init_moe=copy_init_moe,  # type: ignore[arg-type]
        flags=rest,
    )


def filled(source: ModelSource, weights: str = "model") -> Bagel:
    model = build_model(source.config)
    fill_model(model, starting_values(source, model, weights=weights, seed=0))
    return model.eval()


def error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours.detach() - theirs).abs().max() / theirs.abs().max())


def run(model: Bagel, *segments: Segment):
    spec = model.config.layout
    batch = pack([Sample(segments=segments)], spec, SPECIAL)
    width = model.config.latent_token_width
    noised = torch.zeros(len(batch.gen_index), width)
    flow = FlowState(latents=noised, noise=noised, noised=noised)
    with torch.no_grad():
        return batch, model(batch, flow.noised)


def test_the_published_defaults_make_the_fresh_model(given: Given) -> None:
    config = fresh(given).config
    assert config.llm.layer_module == "Qwen2MoTDecoderLayer" and config.llm.qk_norm
    assert (config.llm.tie_word_embeddings, config.llm.rope_theta, config.llm.rms_norm_eps) == (
        False,
        5e4,
        1e-5,
    )
    assert config.vit.num_hidden_layers == 2 and not config.vit.rope  # 3 + 1 - 2
    assert (config.max_latent_size, config.latent_patch_size, config.vit_max_num_patch_per_side) == (32, 2, 6)
    assert config.latent_channels == 4 and config.layout == LayoutSpec(
        vit_patch_size=8, vit_positions_per_side=6, latent_stride=16, latent_positions_per_side=32
    )


def test_a_text_model_without_head_norms_computes_what_transformers_does(given: Given) -> None:
    model = filled(fresh(given, llm_qk_norm=False))
    batch, output = run(model, Segment(kind="text", ids=torch.tensor([5, 30, 9, 70]), supervised=True))
    expected = given.llm(batch.text_ids[None], output_hidden_states=True)
    assert error(output.hidden, expected.hidden_states[-1][0]) < TOLERANCE
    assert error(output.logits, expected.logits[0][batch.label_index]) < TOLERANCE


def test_the_generation_expert_is_the_understanding_expert_at_the_start(given: Given) -> None:
    model = filled(fresh(given))
    values = dict(model.named_parameters())
    copies = [name for name in values if "_moe_gen" in name]
    assert len(copies) == 29
    assert all(torch.equal(values[name], values[name.replace("_moe_gen", "")]) for name in copies)
    own = dict(filled(fresh(given, copy_init_moe=False)).named_parameters())
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    assert not torch.equal(own[name], own[name.replace("_moe_gen", "")])


@pytest.mark.parametrize("tower", ["vit", "pair"])
@pytest.mark.parametrize(("select", "layers"), [(None, 2), (-1, 3), (-3, 1)])
def test_the_tower_computes_what_transformers_does(
    given: Given, tower: str, select: int | None, layers: int
) -> None:
    """`vit_select_layer`: -2 is the last layer but one, with the final norm behind it."""
    model = filled(fresh(given, vit=tower, vit_select_layer=select))
    assert model.config.vit.num_hidden_layers == layers
    pixels = torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    _, output = run(
        model, Segment(kind="und_image", pixels=pixels), Segment(kind="text", ids=torch.tensor([7]))
    )
    theirs = given.vit if tower == "vit" else given.pair.vision_model
    states = theirs(pixel_values=pixels[None] / 127.5 - 1, output_hidden_states=True).hidden_states
    expected = theirs.post_layernorm(states[layers])[0]
    assert error(output.grids.values, expected) < TOLERANCE


def test_coverage_says_what_came_from_where(given: Given, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        filled(fresh(given))
    for line in (
        "language_model: 27 of 31 tensors loaded, 0 in the file not used, 4 start from initial values",  # head norms
        "language_model (gen): 25 of 29 tensors loaded, 0 in the file not used, 4 start from initial values",
        "vit_model: 37 of 37 tensors loaded, 0 in the file not used",
        "connector: 4 tensors start from initial values (--from_scratch True)",
        "llm2vae: 2 tensors start from initial values",
        "time_embedder: 4 tensors start from initial values",
    ):
        assert line in caplog.text, caplog.text
    assert (
        "encoder: 0 of 0 tensors loaded, 16 in the file not used" in caplog.text
    )  # the layer that is cut off


def test_a_tied_model_is_untied_as_a_copy_or_stays_tied(
    given: Given, caplog: pytest.LogCaptureFixture
) -> None:
    """Published: untied by default, with a random output layer where the file has none; a copy of the embeddings here."""
    with caplog.at_level("INFO"):
        language = filled(fresh(given, llm="tied")).language_model
    table = given.tied.model.embed_tokens.weight
    assert (
        torch.equal(language.lm_head.weight, table)
        and language.lm_head.weight is not language.model.embed_tokens.weight
    )
    assert "the output layer is tied to the embeddings; it starts as a copy of them" in caplog.text
    tied = filled(fresh(given, llm="tied", tie_word_embeddings=True)).language_model
    assert tied.lm_head.weight is tied.model.embed_tokens.weight and torch.equal(tied.lm_head.weight, table)
    with pytest.raises(ValueError, match="--tie_word_embeddings True: .* has an output layer of its own"):
        filled(fresh(given, tie_word_embeddings=True))


def test_rotary_towers_leave_the_learned_positions_out(given: Given) -> None:
    model = filled(fresh(given, vit_rope=True, vit_max_num_patch_per_side=70))
    assert model.vit_model.vision_model.embeddings.position_embedding is None
    assert model.config.vit_max_num_patch_per_side == 70


def test_flags_shape_the_rest(given: Given) -> None:
    flags = {
        "layer_module": "Qwen2MoEDecoderLayer",
        "latent_patch_size": 1,
        "max_latent_size": 16,
        "vit_max_num_patch_per_side": 5,
        "vit_patch_size": 8,
        "connector_act": "silu",
        "interpolate_pos": True,
    }
    config = fresh(given, **flags).config
    assert config.llm.layer_module == "Qwen2MoEDecoderLayer" and config.latent_token_width == 4
    assert (config.max_latent_size, config.vit_max_num_patch_per_side, config.interpolate_pos) == (
        16,
        5,
        True,
    )
    assert config.connector_act == "silu"


def test_a_tower_alone_replaces_that_of_a_trained_directory(given: Given, tmp_path: Path) -> None:
    """`--vit_path` beside weights: the directory says what the tower is, the tower's values are the other's."""
    write_json(tmp_path / "llm_config.json", LLM)
    write_json(tmp_path / "vit_config.json", {**VIT, **SIGLIP})
    write_json(
        tmp_path / "bagel_config.json", {**TABLES, "vit_max_num_patch_per_side": 6, "vit_select_layer": -2}
    )
    write_autoencoder(tmp_path)
    config = read_source(tmp_path, from_scratch=True).config
    trained = published_tensors(config)
    save_file(trained, tmp_path / "ema.safetensors")
    values = dict(filled(read_source(tmp_path, vit_path=given["vit"]), "ema").named_parameters())
    key = "encoder.layers.1.mlp.fc1.weight"
    assert torch.equal(values[f"vit_model.vision_model.{key}"], dict(given.vit.named_parameters())[key])
    assert torch.equal(values["connector.fc1.weight"], trained["connector.fc1.weight"])


# ------------------------------------------------------------------------------------------------- refused


def test_parts_that_would_be_random_have_to_be_said(given: Given) -> None:
    with pytest.raises(
        ValueError, match="--llm_path .*: gives the language model only, .* say so with --from_scratch True"
    ):
        read_source("nowhere", llm_path=given["llm"], vit_path=given["vit"], vae_path=given.root)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"vit_patch_size": 14},
            r"--vit_patch_size 14 contradicts .*vit/config.json, where patch_size is 8; leave the flag out",
        ),
        ({"vit_select_layer": -4}, "--vit_select_layer -4: leaves 0 layers of the 3 that the tower has"),
        (
            {"vit_max_num_patch_per_side": 70},
            r"has learned 6 positions per side; give at most 6 \(pictures up to 48 pixels\)",
        ),
    ],
)
def test_flags_that_cannot_be(given: Given, flags: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fresh(given, **flags)


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("llm", {"model_type": "llama"}, "--llm_path .*config.json: model_type is 'llama'; only qwen2"),
        ("llm", {"hidden_act": "gelu"}, "hidden_act is 'gelu'; the model here has 'silu' only"),
        ("llm", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "rope_type is 'yarn'"),
        ("llm", {"use_sliding_window": True}, "use_sliding_window is True"),
        (
            "llm",
            {"intermediate_size": 50},
            r"layers.0.mlp.down_proj.weight is \[32, 48\], the configuration says \[32, 50\]",
        ),
        (
            "llm",
            {"num_hidden_layers": 3},
            r"model.safetensors: 24 tensors missing, .*lacks language_model.model.layers.2",
        ),
        (
            "vit",
            {"model_type": "clip_vision_model"},
            "--vit_path .*: model_type is 'clip_vision_model'; only SigLIP",
        ),
        ("vit", {"num_hidden_layers": 5}, "lacks vit_model.vision_model.encoder.layers.3"),
    ],
)
def test_what_is_not_what_it_says(
    given: Given, tmp_path: Path, file: str, changes: dict, message: str
) -> None:
    config = json.loads((given[file] / "config.json").read_text())
    write_json(tmp_path / "config.json", {**config, **changes})
    (tmp_path / "model.safetensors").write_bytes((given[file] / "model.safetensors").read_bytes())
    paths = {"llm": given["llm"], "vit": given["vit"], file: tmp_path}
    with pytest.raises(ValueError, match=message):
        filled(
            read_source(
                "nowhere",
                llm_path=paths["llm"],
                vit_path=paths["vit"],
                vae_path=given.root,
                from_scratch=True,
            )
        )


def test_a_pickle_is_not_read(given: Given, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((given["llm"] / "config.json").read_bytes())
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    source = read_source(
        "nowhere", llm_path=tmp_path, vit_path=given["vit"], vae_path=given.root, from_scratch=True
    )
    with pytest.raises(ValueError, match="has no model.safetensors .* if it has a pytorch_model.bin"):
        filled(source)


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        (
            "max_latent_size",
            32,
            r"--max_latent_size 32 contradicts .*ema.safetensors, where max_latent_size is 6",
        ),
        (
            "layer_module",
            "Qwen2DecoderLayer",
            "contradicts .*ema.safetensors, where layer_module is Qwen2MoTDecoderLayer",
        ),
        ("llm_qk_norm", False, "--llm_qk_norm False contradicts .*ema.safetensors, where qk_norm is True"),
        ("tie_word_embeddings", True, "contradicts .*ema.safetensors, where tie_word_embeddings is False"),
        ("vit_patch_size", 14, "contradicts .*vit_config.json, where patch_size is 8"),
        ("vit_select_layer", -1, "holds 2 layers .* for which 3 are expected"),
    ],
)
def test_a_flag_that_contradicts_the_directory_names_both(
    tmp_path: Path, flag: str, value: object, message: str
) -> None:
    write_json(tmp_path / "llm_config.json", LLM)
    write_json(tmp_path / "vit_config.json", {**VIT, "num_hidden_layers": 3})
    write_autoencoder(tmp_path)
    save_file(published_tensors(), tmp_path / "ema.safetensors")
    with pytest.raises(ValueError, match=message):
        read_source(tmp_path, flags={flag: value})
    agreeing = {
        "max_latent_size": 6,
        "layer_module": "Qwen2MoTDecoderLayer",
        "llm_qk_norm": True,
        "tie_word_embeddings": False,
        "vit_patch_size": 8,
        "vit_select_layer": -2,
    }
    assert read_source(tmp_path, flags={flag: agreeing[flag]}).config == read_source(tmp_path).config


def test_flags_supply_what_a_directory_leaves_open(tmp_path: Path) -> None:
    """Configurations alone say nothing of the experts or the tables; a random start may choose them."""
    write_json(tmp_path / "llm_config.json", LLM)
    write_json(tmp_path / "vit_config.json", {**VIT, "num_hidden_layers": 4})
    flags = {
        "layer_module": "Qwen2DecoderLayer",
        "max_latent_size": 32,
        "vit_select_layer": -3,
        "connector_act": "relu",
    }
    config = read_source(tmp_path, from_scratch=True, flags=flags).config
    assert (config.llm.layer_module, config.max_latent_size, config.connector_act) == (
        "Qwen2DecoderLayer",
        32,
        "relu",
    )
    assert config.vit.num_hidden_layers == 2


def test_a_random_start_copies_the_expert_only_if_told(tmp_path: Path) -> None:
    write_json(tmp_path / "llm_config.json", LLM)
    write_json(tmp_path / "vit_config.json", VIT)
    name = "language_model.model.layers.0.mlp_moe_gen.up_proj.weight"
    for told, same in ((None, False), (False, False), (True, True)):
        model = filled(read_source(tmp_path, from_scratch=True, copy_init_moe=told))
        values = dict(model.named_parameters())
        assert torch.equal(values[name], values[name.replace("_moe_gen", "")]) == same
