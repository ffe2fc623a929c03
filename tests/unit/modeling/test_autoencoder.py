"""The autoencoder's shapes, its config file, and what it says to a person whose files do not fit."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.autoencoder import (
    AutoEncoder,
    AutoEncoderConfig,
    load_autoencoder,
    read_config,
    save_autoencoder,
)

TINY = AutoEncoderConfig(
    ch=4, ch_mult=(1, 2), num_res_blocks=1, z_channels=3, num_groups=2, scale_factor=2.0, shift_factor=0.5
)


@pytest.fixture
def model() -> AutoEncoder:
    torch.manual_seed(0)
    return AutoEncoder(TINY).eval().requires_grad_(False)


@pytest.fixture
def folder(model: AutoEncoder, tmp_path: Path) -> Path:
    save_autoencoder(model, tmp_path)
    return tmp_path


def change_weights(folder: Path, change: Any) -> None:
    state = load_file(str(folder / "ae.safetensors"))
    save_file(change(state), str(folder / "ae.safetensors"))


@pytest.mark.parametrize(("size", "latent"), [((8, 8), (4, 4)), ((9, 14), (4, 7)), ((2, 2), (1, 1))])
def test_shapes(model: AutoEncoder, size: tuple[int, int], latent: tuple[int, int]) -> None:
    latents = model.encode(torch.zeros(2, 3, *size))
    assert latents.shape == (2, 3, *latent)
    assert model.decode(latents).shape == (2, 3, 2 * latent[0], 2 * latent[1])


def test_encode_scales_the_posterior(model: AutoEncoder) -> None:
    pixels, noise = torch.rand(2, 3, 8, 8) * 2 - 1, torch.randn(2, 3, 4, 4)
    mean, logvar = model.encode_moments(pixels)
    torch.testing.assert_close(model.encode(pixels), 2.0 * (mean - 0.5))
    torch.testing.assert_close(model.encode(pixels, noise), 2.0 * (mean + (0.5 * logvar).exp() * noise - 0.5))


def test_same_noise_same_latents(model: AutoEncoder) -> None:
    pixels, noise = torch.rand(1, 3, 8, 8), torch.randn(1, 3, 4, 4)
    before = torch.get_rng_state()
    first, second = model.encode(pixels, noise), model.encode(pixels, noise)
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(first, model.encode(pixels, -noise))


def test_images_do_not_depend_on_each_other(model: AutoEncoder) -> None:
    pixels = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(model.encode(pixels)[1:2], model.encode(pixels[1:2]))


def test_wrong_shapes(model: AutoEncoder) -> None:
    with pytest.raises(ValueError, match=r"\(1, 1, 8, 8\)"):
        model.encode(torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at least 2"):
        model.encode(torch.zeros(1, 3, 1, 8))
    with pytest.raises(ValueError, match=r"noise is \(1, 3, 4, 1\)"):
        model.encode(torch.zeros(2, 3, 8, 8), torch.zeros(1, 3, 4, 1))
    with pytest.raises(ValueError, match=r"latents to decode are \(1, 4, 2, 2\)"):
        model.decode(torch.zeros(1, 4, 2, 2))


def test_saved_and_loaded_is_the_same(model: AutoEncoder, folder: Path) -> None:
    loaded = load_autoencoder(folder)
    assert loaded.config == TINY
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    pixels = torch.rand(1, 3, 8, 8)
    assert torch.equal(loaded.encode(pixels), model.encode(pixels))
    assert sorted(f.name for f in folder.iterdir()) == ["ae.safetensors", "ae_config.json"]


def test_other_file_name_prefix_and_dtype(model: AutoEncoder, folder: Path) -> None:
    change_weights(
        folder, lambda state: {f"module.{name}": tensor.bfloat16() for name, tensor in state.items()}
    )
    (folder / "ae.safetensors").rename(folder / "vae_model.safetensors")
    loaded = load_autoencoder(folder)
    weight = loaded.encoder.conv_in.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.encoder.conv_in.weight.bfloat16().float())


def test_keys_that_do_not_fit_are_all_named(folder: Path) -> None:
    def change(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del state["encoder.mid.attn_1.q.bias"], state["decoder.norm_out.weight"]
        state["decoder.conv_out.bias"] = torch.zeros(4)
        return {**state, "quant_conv.weight": torch.zeros(1)}

    change_weights(folder, change)
    with pytest.raises(ValueError) as caught:
        load_autoencoder(folder)
    message = str(caught.value)
    assert "missing (2): decoder.norm_out.weight, encoder.mid.attn_1.q.bias" in message
    assert "unexpected (1): quant_conv.weight" in message
    assert "wrong shape (1): decoder.conv_out.bias [4] instead of [3]" in message
    assert str(folder / "ae_config.json") in message


def test_without_config_the_published_size_is_meant(folder: Path) -> None:
    (folder / "ae_config.json").unlink()
    assert read_config(folder) == AutoEncoderConfig()
    with pytest.raises(ValueError, match="the published values"):
        load_autoencoder(folder)


def test_no_or_broken_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no ae\.safetensors or vae_model\.safetensors here"):
        load_autoencoder(tmp_path)
    (tmp_path / "ae.safetensors").write_bytes(b"cut")
    with pytest.raises(
        ValueError, match=r"ae\.safetensors: cannot be read as safetensors .*; copy it here again"
    ):
        load_autoencoder(tmp_path)


def test_config_round_trip() -> None:
    state = TINY.to_json()
    assert state["downsample"] == 2
    assert AutoEncoderConfig.from_json(json.loads(json.dumps(state))) == TINY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ch_mul": [1]}, "unknown key 'ch_mul'; the nearest valid key is 'ch_mult'"),
        ({"scale_factor": None}, "scale_factor is None"),
        ({"scale_factor": float("nan")}, "scale_factor is nan"),
        ({"scale_factor": 0}, "must be above 0"),
        ({"shift_factor": True}, "shift_factor is True"),
        ({"ch": 0}, "ch is 0"),
        ({"ch": "4"}, "ch is '4'"),
        ({"z_channels": 2.5}, "z_channels is 2.5"),
        ({"ch_mult": []}, "ch_mult is empty"),
        ({"ch_mult": [1, 0]}, r"ch_mult\[1\] is 0"),
        ({"ch_mult": 4}, "ch_mult is 4"),
        ({"num_groups": 3}, "num_groups 3 does not divide the width 4"),
        ({"downsample": 8}, "downsample is 8, but 2 levels"),
    ],
)
def test_bad_config(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"here.json: .*{message}"):
        AutoEncoderConfig.from_json({**TINY.to_json(), **change}, where="here.json")


def test_config_with_missing_keys() -> None:
    state = {
        key: value for key, value in TINY.to_json().items() if key not in ("scale_factor", "ch", "resolution")
    }
    with pytest.raises(ValueError, match="missing ch, scale_factor$"):
        AutoEncoderConfig.from_json(state)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_config_that_is_no_object(tmp_path: Path, content: str) -> None:
    (tmp_path / "ae_config.json").write_text(content)
    with pytest.raises(ValueError, match="ae_config.json: "):
        read_config(tmp_path)
