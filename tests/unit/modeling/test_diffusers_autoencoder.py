"""A diffusers AutoencoderKL directory gives the same autoencoder: against diffusers itself, with random weights.

Relative errors below 1e-5. Worst measured: moments 5.8e-7, latents 6.5e-7, pictures 6.3e-7.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from modeling.autoencoder import load_autoencoder, read_config

TOLERANCE = 1e-5
SIZES = {
    "block_out_channels": [8, 16, 24], "layers_per_block": 2, "latent_channels": 4, "norm_num_groups": 4, "sample_size": 32,
    "down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3, "scaling_factor": 0.37,
    "shift_factor": 0.12, "use_quant_conv": False, "use_post_quant_conv": False, "in_channels": 3, "out_channels": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(**SIZES).eval().requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    folder = tmp_path_factory.mktemp("vae")
    model.save_pretrained(folder)
    return model, folder


def error(ours: torch.Tensor, other: torch.Tensor) -> float:
    assert ours.shape == other.shape
    return float((ours - other).abs().max() / other.abs().max())


def test_it_encodes_and_decodes_as_diffusers_does(theirs) -> None:
    model, folder = theirs
    ours = load_autoencoder(folder)
    pixels = torch.rand(2, 3, 32, 24) * 2 - 1
    posterior = model.encode(pixels).latent_dist
    mean, logvar = ours.encode_moments(pixels)
    assert error(mean, posterior.mean) < TOLERANCE
    assert error(logvar.clamp(-30, 20), posterior.logvar) < TOLERANCE
    scaled = (posterior.mean - 0.12) * 0.37  # how diffusers' pipelines scale a FLUX latent
    latents = ours.encode(pixels)
    assert error(latents, scaled) < TOLERANCE
    assert error(ours.decode(latents), model.decode(scaled / 0.37 + 0.12).sample) < TOLERANCE


def test_old_names_and_the_file_itself_are_read(theirs, tmp_path: Path) -> None:
    _, folder = theirs
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        tensors = {k.replace(f".{new}.", f".{name}."): v for k, v in tensors.items()}
    save_file(tensors, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = load_autoencoder(folder).state_dict()
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        found = load_autoencoder(path).state_dict()
        assert all(torch.equal(found[name], x) for name, x in expected.items())


def test_a_weights_file_of_the_published_form_beside_it_counts_alone(theirs, tmp_path: Path) -> None:
    """`--vae_path flux/vae/ae.safetensors`: named itself, or found first in its directory, it is not read as diffusers' own."""
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    (tmp_path / "ae.safetensors").write_bytes(b"")
    assert read_config(tmp_path).z_channels == read_config(tmp_path / "ae.safetensors").z_channels == 16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_quant_conv": True}, "use_quant_conv is True; an autoencoder of the FLUX kind has False"),
        ({"_class_name": "AutoencoderTiny"}, "_class_name is 'AutoencoderTiny'; only AutoencoderKL"),
        ({"latents_mean": [0.0]}, r"latents_mean is \[0.0\]"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"]}, "down_block_types has AttnDownEncoderBlock2D"),
        ({"block_out_channels": [8, 12]}, "no multiples of the first"),
        ({"layers_per_block": 1}, r"do not fit the autoencoder of .*config.json\n  unexpected"),
    ],
)
def test_what_cannot_be_read_is_named(theirs, tmp_path: Path, changes: dict, message: str) -> None:
    _, folder = theirs
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match=message):
        load_autoencoder(tmp_path)
