"""The autoencoder against diffusers' AutoencoderKL. Tolerances as for golden cases; worst error measured 6.0e-7."""

import torch
from torch import Tensor

from modeling.autoencoder import AutoEncoder, AutoEncoderConfig

SMALL = AutoEncoderConfig(ch=8, ch_mult=(1, 2, 4, 4), num_groups=4, scale_factor=0.7, shift_factor=-0.2)


def error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def test_same_numbers_as_diffusers() -> None:
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    torch.manual_seed(0)
    ours = AutoEncoder(SMALL).eval().requires_grad_(False)
    for param in ours.parameters():  # norms and biases too, so that no term can vanish unnoticed
        param.normal_(std=0.2 if param.ndim == 1 else param[0].numel() ** -0.5)
    theirs = AutoencoderKL(
        block_out_channels=SMALL.widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=SMALL.num_res_blocks,
        latent_channels=SMALL.z_channels,
        norm_num_groups=SMALL.num_groups,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()
    theirs.load_state_dict(convert_ldm_vae_checkpoint(ours.state_dict(), dict(theirs.config)))
    pixels = torch.rand(2, 3, 40, 27) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(pixels).latent_dist
        mean, logvar = ours.encode_moments(pixels)
        assert mean.shape == (2, 16, 5, 3)
        assert error(mean, posterior.mean) < 1e-5
        assert error(logvar, posterior.logvar) < 1e-5
        assert error(ours.encode(pixels), 0.7 * (posterior.mean + 0.2)) < 1e-5
        latents = torch.randn(2, 16, 5, 3)
        assert error(ours.decode(latents), theirs.decode(latents / 0.7 - 0.2).sample) < 2e-5


def test_published_size() -> None:
    with torch.device("meta"):
        state = AutoEncoder(AutoEncoderConfig()).state_dict()
    assert len(state) == 244
    assert sum(tensor.numel() for tensor in state.values()) == 83_819_683
    shapes = {
        "encoder.conv_in.weight": (128, 3, 3, 3),
        "encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        "encoder.mid.attn_1.q.weight": (512, 512, 1, 1),
        "encoder.conv_out.weight": (32, 512, 3, 3),
        "decoder.conv_in.weight": (512, 16, 3, 3),
        "decoder.up.3.block.2.conv2.weight": (512, 512, 3, 3),
        "decoder.up.1.block.0.nin_shortcut.weight": (256, 512, 1, 1),
        "decoder.up.1.upsample.conv.weight": (256, 256, 3, 3),
        "decoder.conv_out.weight": (3, 128, 3, 3),
    }
    assert {name: tuple(state[name].shape) for name in shapes} == shapes
    assert "encoder.down.3.downsample.conv.weight" not in state
    assert "decoder.up.0.upsample.conv.weight" not in state
