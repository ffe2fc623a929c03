"""PerceptionGPT's modules against their own numbers; weights are made from the recipe in the golden folder's README."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from modeling.bagel.init import initial_value
from modeling.heads.box_embedding import BoxEmbeddingHead
from modeling.mask_autoencoder import Bottleneck, MaskAutoencoder, MaskAutoencoderConfig
from tests.unit.modeling.tiny import tiny_config

GOLDEN = Path(__file__).parents[2] / "golden" / "grounding"
CASES = json.loads((GOLDEN / "perceptiongpt_modules.json").read_text())
TENSORS = load_file(GOLDEN / "perceptiongpt_modules.safetensors")


def made(seed: int, index: int, shape: list[int], name: str) -> Tensor:
    """splitmix64's finaliser over a counter, in [-1, 1), scaled by what the parameter is."""
    count = int(np.prod(shape))
    with np.errstate(over="ignore"):
        z = np.uint64((seed * 2**20 + 7919 * index) % 2**64)
        z = z + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    u = 2 * ((z >> np.uint64(11)).astype(np.float64) * 2.0**-53) - 1
    if len(shape) > 1:
        u *= np.sqrt(3 / np.prod(shape[1:]))
    elif name.endswith("weight"):
        u = 1 + 0.2 * u
    else:
        u *= 0.1
    return torch.from_numpy(u.astype(np.float32)).view(shape)


def fill(module: nn.Module, case: dict[str, Any]) -> None:
    wanted = dict(module.named_parameters())
    for p in case["params"]:
        wanted.pop(p["name"]).data.copy_(made(case["weight_seed"], p["index"], p["shape"], p["name"]))
    assert all(name.endswith(("running_mean", "running_var")) for name in wanted), wanted.keys()


def block(name: str) -> dict[str, Any]:
    return next(case for case in CASES["blocks"] if case["id"] == name)


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("bottleneck_stride2_ln", lambda: Bottleneck(6, 4, 8, 2)),
        ("bottleneck_plain_bn", lambda: Bottleneck(8, 4, 8, norm="batch")),
        ("deconv_stride2_ln", lambda: Bottleneck(8, 3, 6, 2, up=True)),
    ],
)
@torch.no_grad()
def test_blocks(name: str, module: Any) -> None:
    built = module()
    fill(built, block(name))
    torch.testing.assert_close(built(TENSORS[f"{name}.in"]), TENSORS[f"{name}.out"], rtol=0, atol=1e-5)


def close(found: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(
        found, want.reshape(found.shape), rtol=0, atol=1e-4 * max(1.0, float(want.std()))
    )


@torch.no_grad()
def test_encoder() -> None:
    config = MaskAutoencoderConfig(down=(2, 2, 2, 2), code=512, norm="batch")
    model = MaskAutoencoder(config)
    for stage in range(1, 5):  # what PerceptionGPT's mask encoder does not have
        delattr(model, f"uplayer{stage}")
    del model.uplayer_top, model.conv1_1
    fill(model, CASES["mask_encoder"])
    assert sum(p.numel() for n, p in model.named_parameters() if "running" not in n) == 4_322_912
    code = model.encode(TENSORS["mask256"].float())
    close(code, TENSORS["mask_encoder.code512"])
    close(model.linear_dec(code), TENSORS["mask_encoder.token4096"])


@torch.no_grad()
def test_autoencoder() -> None:
    with torch.device("meta"):
        model = MaskAutoencoder(MaskAutoencoderConfig(norm="batch"))
    model.to_empty(device="cpu")
    for name, p in model.named_parameters():
        if "running" in name:
            p.fill_(name.endswith("var"))
    fill(model, CASES["autoencoder"])
    assert sum(p.numel() for n, p in model.named_parameters() if "running" not in n) == 34_303_216
    code = model.encode(TENSORS["mask256"][:1].float())
    close(code, TENSORS["autoencoder.code4096"])
    close(model.decode(code), TENSORS["autoencoder.logits"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"resolution": 48}, "here: mask autoencoder: resolution 48 is not a multiple of 32"),
        ({"width": 6}, "here: mask autoencoder: width 6 is not a multiple of 4"),
        ({"down": [1]}, "here: mask autoencoder: down and up are four numbers of blocks each"),
        ({"norm": "group"}, "here: mask autoencoder: norm is 'group'; it must be layer or batch"),
        ({"codes": 3}, "here: unknown key 'codes'; did you mean 'code'"),
    ],
)
def test_what_is_wrong_with_a_size_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MaskAutoencoderConfig.from_json(values, "here")


def test_a_batch_learns() -> None:
    """With the sizes of the recipe, at which torch's own backward pass broke on maps that lay channels last."""
    torch.manual_seed(0)
    sizes = {"resolution": 64, "width": 16, "down": [1, 1, 1, 1], "up": [1, 1, 1, 1], "code": 32}
    model = MaskAutoencoder(MaskAutoencoderConfig.from_json(sizes, "here"))
    masks = torch.zeros(52, 64, 64)
    for i, mask in enumerate(masks):
        mask[i % 40 : i % 40 + 20, 10 + i % 30 : 30 + i % 30] = 1
    model.decode(model.encode(masks)).sub(masks).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


@torch.no_grad()
def test_box_of_a_state() -> None:
    case = next(case for case in CASES["small"] if case["id"] == "box_decoder")
    head = BoxEmbeddingHead(hidden_size=24, grid_size=1, patch_size=8, width=16)
    fill(head, case)
    none = torch.zeros(0, dtype=torch.int64)
    found = head(SimpleNamespace(hidden=TENSORS["box_decoder.in"], regions=none))  # type: ignore[arg-type]
    torch.testing.assert_close(found.boxes, TENSORS["box_decoder.out"], rtol=0, atol=1e-5)
    start = initial_value("heads.box.layers.2.weight", torch.Size((4, 16)), tiny_config(), 0)
    assert not start.any(), "a new head says the middle"
