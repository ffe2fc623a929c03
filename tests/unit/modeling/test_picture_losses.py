"""Losses on decoded pictures: gradients against finite differences through a tiny VAE, weights, chunks, which pictures count."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from data.packing import pack
from data.types import PackedBatch, Sample, Segment
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig
from modeling.bagel.latents import LatentEncoder
from modeling.losses.pictures import (
    PictureLoss,
    chunk_size,
    dissimilarity,
    mean_absolute,
    mean_square,
)
from modeling.ops.ssim import ssim
from modeling.types import FlowState, LossValues
from tests.unit.modeling.tiny import SPEC, SPECIAL, picture, text

COMPARE = {"l1": mean_absolute, "l2": mean_square, "ssim": dissimilarity(7)}
TIMES = {"edit": 0.05, "draw": 0.1, "noisy": 0.6, "wide": 0.2}
MAX_T = 0.3


def tiny_vae() -> AutoEncoder:
    torch.manual_seed(0)
    config = AutoEncoderConfig(ch=4, ch_mult=(1, 1, 2, 2), num_res_blocks=1, z_channels=2, num_groups=2)
    return AutoEncoder(config).requires_grad_(False).eval()


def target(name: str, *size: int) -> Segment:
    return Segment(kind="gen_image", pixels=picture(len(name), *size), timestep=TIMES[name], noise_seed=3)


def batch() -> PackedBatch:
    """An edit and a picture from words at small times, one picture that is too noisy, an edit of another shape."""
    source = Segment(kind="cond_image", pixels=picture(8, 32, 32), noise_seed=4)
    samples = [
        Sample(segments=(source, text(10), target("edit", 32, 32))),
        Sample(segments=(text(11), target("draw", 32, 32))),
        Sample(segments=(source, text(12), target("noisy", 32, 32))),
        Sample(segments=(source, text(13), target("wide", 16, 32))),
    ]
    return pack(samples, SPEC, SPECIAL)


def loss(compare: str = "l1", **rest: object) -> PictureLoss:
    vae = tiny_vae().double()
    fixed = {"by_pixel": compare != "ssim", "max_t": MAX_T, "paired_only": False}
    return PictureLoss(decode=vae.decode, patch=2, compare=COMPARE[compare], **{**fixed, **rest})


def flow_and_velocity(of: PackedBatch) -> tuple[FlowState, Tensor]:
    flow = LatentEncoder(tiny_vae(), 2)(of)
    flow = FlowState(**{n: getattr(flow, n).double() for n in ("latents", "noise", "noised")})
    # Near the true velocity, as of a model that has learnt something.
    off = torch.randn(flow.noise.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return flow, flow.noise - flow.latents + off


def values(of: PictureLoss, velocity: Tensor, flow: FlowState, pictures: PackedBatch) -> LossValues:
    return of.values(SimpleNamespace(velocity=velocity), pictures, flow)  # type: ignore[arg-type]


@pytest.mark.parametrize("compare", COMPARE)
def test_gradients_are_those_of_finite_differences(compare: str) -> None:
    pictures = batch()
    flow, velocity = flow_and_velocity(pictures)
    of = loss(compare)
    velocity.requires_grad_()
    values(of, velocity, flow, pictures).total.backward()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _ in range(3):
            step = 1e-6 * torch.randn(velocity.shape, generator=g, dtype=torch.float64)
            ahead, behind = (values(of, velocity + s * step, flow, pictures).total for s in (1, -1))
            # Worst measured, of l1 (whose pixels may pass through 0), l2 and ssim: 3e-8.
            assert (velocity.grad * 2 * step).sum().item() == pytest.approx(float(ahead - behind), rel=1e-5)


def test_the_value_is_the_weighted_mean_over_the_pictures_that_count() -> None:
    pictures = batch()
    flow, velocity = flow_and_velocity(pictures)
    of = loss("l1")
    found, things = values(of, velocity, flow, pictures), of.things(pictures)
    weights = [1 - TIMES[name] / MAX_T for name in ("edit", "draw", "wide")]
    sizes = [3 * 32 * 32, 3 * 32 * 32, 3 * 16 * 32]
    assert things.amount.tolist() == pytest.approx([w * n for w, n in zip(weights, sizes, strict=True)])
    assert found.total.item() == pytest.approx(found.each.sum().item())
    ends = torch.tensor(pictures.sample_lens).cumsum(0)
    assert torch.searchsorted(ends, things.place, right=True).tolist() == [0, 1, 3]


def test_with_the_true_velocity_only_the_autoencoder_errs() -> None:
    pictures = batch()
    flow, _ = flow_and_velocity(pictures)
    of, vae = loss("l2"), tiny_vae().double()
    found = values(of, flow.noise - flow.latents, flow, pictures).each
    place = int(pictures.gen_hw[:1].prod())  # the latent of the first target comes after that of its source
    clean = flow.latents[place : 2 * place].view(2, 2, 2, 2, 2).permute(4, 0, 2, 1, 3).reshape(1, 2, 4, 4)
    error = (vae.decode(clean) / 2 + 0.5 - pictures.gen_pixels[1].double() / 255).square().mean()
    assert found[0].item() == pytest.approx(float(error) * float(of.things(pictures).amount[0]), rel=1e-9)


def test_only_pairs_on_request() -> None:
    amounts = [loss(paired_only=p).things(batch()).amount for p in (False, True)]
    assert [len(a) for a in amounts] == [3, 2]


@pytest.mark.parametrize("chunk", [1, 2, "all"])
def test_chunks_change_nothing(chunk: object) -> None:
    pictures = batch()
    flow, velocity = flow_and_velocity(pictures)
    results = []
    for of in (loss("ssim"), loss("ssim", chunk=chunk)):
        v = velocity.clone().requires_grad_()
        found = values(of, v, flow, pictures)
        found.total.backward()
        results.append((found.each, v.grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_the_gradient_can_be_scaled_beside_the_value() -> None:
    pictures = batch()
    flow, velocity = flow_and_velocity(pictures)
    found = []
    for scale in (1.0, 0.1):
        v = velocity.clone().requires_grad_()
        total = values(loss(gradient_scale=scale), v, flow, pictures).total
        total.backward()
        found.append((total.item(), v.grad))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[1][1], 0.1 * found[0][1])


def test_a_pack_without_such_pictures_stays_in_the_graph() -> None:
    nothing = pack([Sample(segments=(text(1), text(2, supervised=True)))], SPEC, SPECIAL)
    empty = torch.zeros(0, 8, dtype=torch.float64)
    velocity = empty.clone().requires_grad_()
    found = values(loss(), velocity, FlowState(latents=empty, noise=empty, noised=empty), nothing)
    found.total.backward()
    assert found.total.item() == 0 and len(found.each) == 0 and velocity.grad.shape == (0, 8)


@pytest.mark.parametrize(
    ("chunk", "pixels", "expected"),
    [("adaptive", 1024 * 1024, 1), ("adaptive", 512 * 512, 2), ("adaptive", 256 * 256, 4), (3, 64, 3), ("all", 64, 9)],
)  # fmt: skip
def test_chunk_sizes(chunk: object, pixels: int, expected: int) -> None:
    assert chunk_size(chunk, pixels, 9) == expected  # type: ignore[arg-type]


def test_ssim_is_that_of_scikit_image() -> None:
    metrics = pytest.importorskip("skimage.metrics")
    g = torch.Generator().manual_seed(0)
    a = torch.rand(2, 3, 24, 20, generator=g, dtype=torch.float64)
    b = (a + 0.2 * torch.randn(a.shape, generator=g, dtype=torch.float64)).clamp(0, 1)
    for x, y, found in zip(a, b, ssim(a, b), strict=True):
        expected = metrics.structural_similarity(
            np.asarray(x), np.asarray(y), channel_axis=0, data_range=1.0, gaussian_weights=True, sigma=1.5,
            use_sample_covariance=False,
        )  # fmt: skip
        assert found.item() == pytest.approx(
            expected, abs=1e-4
        )  # its window is cut at 3.5 sigma: 11 pixels too


def test_ssim_of_equal_and_of_small_pictures() -> None:
    a = torch.rand(1, 3, 5, 8)
    assert ssim(a, a).item() == pytest.approx(1.0) and ssim(a, 1 - a).item() < 0.5


def test_settings_reach_the_loss() -> None:
    from train.args import PictureLossArgs
    from train.objective import picture_losses

    assert PictureLossArgs().weights() == {}
    args = PictureLossArgs(
        pixel_loss_weight=2.0, ssim_loss_weight=0.5, pixel_loss_type="mse", ssim_window_size=7
    )
    made = picture_losses(args, tiny_vae().double().decode, 2)
    assert args.weights() == {"pixel": 2.0, "ssim": 0.5} and set(made) == {"pixel", "ssim"}
    pictures = batch()
    flow, velocity = flow_and_velocity(pictures)
    output = SimpleNamespace(velocity=velocity)
    expected = {
        "pixel": loss("l2", paired_only=True),
        "ssim": replace(loss("ssim", paired_only=True), max_t=0.1),
    }
    for name, of in expected.items():
        found = made[name].values(output, pictures, flow)  # type: ignore[arg-type]
        torch.testing.assert_close(found.each, values(of, velocity, flow, pictures).each)
    assert [len(made[n].things(pictures).amount) for n in ("pixel", "ssim")] == [2, 1]
    assert [PictureLossArgs(pixel_loss_adaptive_chunk=False).chunk, PictureLossArgs(pixel_loss_use_v0=True).chunk] == [
        2, "all",
    ]  # fmt: skip
