"""Operations of a step against torch's own counter, and visible pairs against the rule written out."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data.layout import visible_pairs
from data.packing import pack
from data.types import Sample, Segment
from modeling.autoencoder import AutoEncoder, AutoEncoderConfig
from modeling.bagel.bagel import Bagel
from modeling.bagel.flops import FROZEN, PASSED, TRAINED, PackShape, Passes, encode_flops, step_flops
from modeling.build import build_model
from modeling.ops.attention import dense_allowed
from tests.unit.modeling.test_attention import random_layout
from tests.unit.modeling.tiny import SPEC, SPECIAL, made_up_latents, picture, text, tiny_config, tiny_model
from train.config import build_args
from train.flops import PEAK_TFLOPS, passes_of, peak_tflops
from train.param_manager import freeze

CONFIG = replace(tiny_config(), heads={})


@torch.no_grad()
def counted(model: Bagel, sample: Sample) -> tuple[float, float]:
    """Operations of a forward pass: as torch counts them, and ours."""
    batch = pack([sample], SPEC, SPECIAL)
    flow = made_up_latents(batch)
    with FlopCounterMode(display=False) as counter:
        _ = model(batch, flow.noised).logits
    return counter.get_total_flops(), step_flops(model.config, PackShape.of(batch)) / TRAINED


def filled_up(pairs: int, tokens: int) -> int:
    """What attention does in vain: on a CPU, our kernel fills a short sample up to a multiple of 16 tokens, and masks."""
    square = (-(-tokens // 16) * 16) ** 2
    return 2 * 2 * CONFIG.llm.hidden_size * CONFIG.llm.num_hidden_layers * (square - pairs)


@pytest.mark.parametrize(
    "segment",
    [
        Segment(kind="und_image", pixels=picture(1, 32, 64)),
        Segment(kind="gen_image", pixels=picture(2, 32, 64), timestep=0.3),
    ],
    ids=lambda s: s.kind,
)
def test_a_picture_alone_needs_what_torch_counts(segment: Segment) -> None:
    theirs, ours = counted(tiny_model(CONFIG), Sample(segments=(segment,)))
    tokens = int(segment.pixels[0].numel() / (8 if segment.kind == "und_image" else 16) ** 2) + 2
    assert theirs - ours == filled_up(tokens**2, tokens)


def test_of_a_causal_text_half_the_square_is_needed() -> None:
    theirs, ours = counted(tiny_model(CONFIG), Sample(segments=(text(10, 11, 12, 13, supervised=True),)))
    assert theirs - ours == filled_up(6 * 7 // 2, 6)


def test_a_frozen_tower_needs_no_backward() -> None:
    batch = PackShape.of(
        pack([Sample(segments=(Segment(kind="und_image", pixels=picture(1)),))], SPEC, SPECIAL)
    )
    whole, frozen = (step_flops(CONFIG, batch, p) for p in (Passes(), Passes(vit=FROZEN)))
    deeper = replace(CONFIG, vit=replace(CONFIG.vit, num_hidden_layers=4))
    growth, frozen_growth = (
        step_flops(deeper, batch) - whole,
        step_flops(deeper, batch, Passes(vit=FROZEN)) - frozen,
    )
    assert growth / frozen_growth == TRAINED / FROZEN


@pytest.mark.parametrize("size", [(64, 64), (32, 96)])
@pytest.mark.parametrize("levels", [(1, 2, 2), (1, 1, 1, 2)])
@torch.no_grad()
def test_the_autoencoder_needs_what_torch_counts(size: tuple[int, int], levels: tuple[int, ...]) -> None:
    config = AutoEncoderConfig(ch=8, ch_mult=levels, num_res_blocks=2, z_channels=4, num_groups=4)
    with FlopCounterMode(display=False) as counter:
        AutoEncoder(config).encode_moments(torch.zeros(2, 3, *size))
    assert counter.get_total_flops() == encode_flops(config, [size] * 2)


def test_the_published_autoencoder_is_counted_as_measured() -> None:
    found = [round(encode_flops(AutoEncoderConfig(), [(side, side)]) / 1e9) for side in (256, 512, 1024)]
    assert found == [273, 1118, 4883]  # measured on the published autoencoder, in GFLOP


def test_visible_pairs_are_those_of_the_rule() -> None:
    for seed in range(200):
        layout = random_layout(seed)
        assert visible_pairs(*layout) == int(dense_allowed(*layout).sum())


def test_peaks_go_by_the_devices_name() -> None:
    assert peak_tflops("NVIDIA H200") == 989.0
    assert peak_tflops("NVIDIA H20") == 148.0
    assert peak_tflops("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_tflops("NVIDIA H200", 500.0) == 500.0
    assert peak_tflops("") == peak_tflops("some card") == 0.0
    assert all(v > 0 for v in PEAK_TFLOPS.values())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, Passes()),
        ({"freeze_vit": True}, Passes(vit=FROZEN)),
        ({"freeze_vit": True, "freeze_connector": True}, Passes(vit=FROZEN, connector=FROZEN)),
        ({"freeze_llm": True}, Passes(und=PASSED, gen=PASSED, vocabulary=PASSED)),
        ({"freeze_mot_und": True}, Passes(und=PASSED)),
    ],
)
def test_what_is_frozen_needs_fewer_products(flags: dict[str, bool], expected: Passes) -> None:
    model = build_model(CONFIG)
    freeze(model, build_args(flags).params)
    assert passes_of(model) == expected
