"""Fused kernels: refused where they cannot run, used where they are put, and (on a GPU) equal to plain torch."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from data.packing import pack
from modeling.ops.kernels import TORCH, Kernels, liger_kernels, use_kernels
from modeling.ops.rope import rope_table
from tests.unit.modeling.tiny import SPEC, SPECIAL, every_sample, made_up_latents, tiny_model
from train.objective import Objective

CUDA = torch.device("cuda")


def random(*shape: int, device: torch.device, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g).to(device, dtype).requires_grad_()


def rms_norm(kernels: Kernels, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [random(40, 3, 64, device=device, seed=0), random(64, device=device, seed=1)]
    return inputs, [kernels.rms_norm(*inputs, 1e-6)]


def swiglu(kernels: Kernels, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [random(40, 96, device=device, seed=s) for s in (0, 1)]
    return inputs, [kernels.swiglu(*inputs)]


def rotate(kernels: Kernels, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [random(40, 4, 32, device=device, seed=0), random(40, 2, 32, device=device, seed=1)]
    cos, sin = rope_table(torch.arange(40, device=device) * 7, 32, 10000.0)
    # Its arguments may be overwritten, which a leaf must not be.
    return inputs, list(kernels.rotate(*(x * 1.0 for x in inputs), cos, sin))


def cross_entropy(kernels: Kernels, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
    inputs = [random(70, 64, device=device, seed=0), random(500, 64, device=device, seed=1)]
    labels = torch.randint(500, (70,), generator=torch.Generator().manual_seed(2)).to(device)
    amount = torch.rand(70, generator=torch.Generator().manual_seed(3)).to(device)
    return inputs, list(kernels.cross_entropy(*inputs, labels, amount))


CASES: dict[str, Callable[[Kernels, torch.device], tuple[list[Tensor], list[Tensor]]]] = {
    "rms_norm": rms_norm, "swiglu": swiglu, "rotate": rotate, "cross_entropy": cross_entropy,
}  # fmt: skip


def test_every_operation_has_a_case() -> None:
    assert set(CASES) == {f.name for f in fields(Kernels)}


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_liger_agrees_with_torch(name: str) -> None:
    pytest.importorskip("liger_kernel")
    agree(liger_kernels("cuda"), CASES[name], CUDA)


def agree(
    kernels: Kernels,
    case: Callable[[Kernels, torch.device], tuple[list[Tensor], list[Tensor]]],
    device: torch.device,
) -> None:
    """The same results and, of a sum of them with random weights, the same gradients."""
    found = []
    for which in (kernels, TORCH):
        inputs, outputs = case(which, device)
        weighted = [
            (x * random(*x.shape, device=device, seed=9).detach()).sum() for x in outputs if x.requires_grad
        ]
        gradients = torch.autograd.grad(sum(weighted), inputs)
        found.append([*(x.detach() for x in outputs), *gradients])
    for a, b in zip(*found, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_without_a_gpu_they_are_refused() -> None:
    with pytest.raises(
        ValueError, match="--liger needs a GPU: its kernels do not run on cpu; leave the flag out"
    ):
        liger_kernels("cpu")


def test_without_the_package_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "liger_kernel", None)
    with pytest.raises(ImportError, match=r"--liger needs liger-kernel.*\[kernels\]"):
        liger_kernels("cuda")


def test_every_operation_of_the_model_goes_through_the_kernels() -> None:
    called = dict.fromkeys(CASES, 0)

    def counting(name: str) -> Callable[..., object]:
        def call(*args: Tensor) -> object:
            called[name] += 1
            return getattr(TORCH, name)(*args)

        return call

    model, batch = tiny_model(), pack(every_sample(), SPEC, SPECIAL)
    flow = made_up_latents(batch)
    plain = model(batch, flow.noised)
    use_kernels(model, replace(TORCH, **{name: counting(name) for name in CASES}))
    output = model(batch, flow.noised)
    Objective({"ce": 1.0}).terms(output, batch, flow)
    layers = model.config.llm.num_hidden_layers
    # Per expert and layer: two norms, and one each of q and k; at the end one per expert.
    assert called == {
        "rms_norm": 2 * (4 * layers + 1),
        "swiglu": 2 * layers,
        "rotate": layers,
        "cross_entropy": 1,
    }
    assert torch.equal(plain.velocity, output.velocity)
