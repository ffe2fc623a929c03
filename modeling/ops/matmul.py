"""Which library multiplies float32 matrices, and how exactly."""

import torch


def set_matmul_precision(name: str, device_type: str) -> None:
    """Say how float32 matrix products are computed in this process.

    On a CPU torch asks MKL for `highest` and oneDNN for `medium`, where products may be of bf16. Only processors with matrix
    units (AMX) have such products; on the others `medium` is float32 by another library, which on AMD's is twice as fast as MKL
    (benchmarks/train_step.py). So `highest` means oneDNN wherever it is found to keep float32.

    Args:
        name: `highest`, `high` or `medium`, as torch has them.
        device_type: that the process computes on.
    """
    torch.set_float32_matmul_precision(name)
    if name == "highest" and device_type == "cpu":
        torch.set_float32_matmul_precision("medium")
        if not keeps_float32():
            torch.set_float32_matmul_precision("highest")


def keeps_float32() -> bool:
    """Whether the products that make up a layer's forward and backward pass have float32's precision as torch is set now."""
    generator = torch.Generator().manual_seed(0)
    x, w, g = (torch.randn(*shape, generator=generator) for shape in ((384, 128), (256, 128), (384, 256)))
    for left, right in ((x, w.T), (g, w), (g.T, x)):
        exact = left.double() @ right.double()
        if ((left @ right).double() - exact).abs().max() > 1e-5 * exact.abs().max():  # bf16: 4e-3, TF32: 5e-4
            return False
    return True
