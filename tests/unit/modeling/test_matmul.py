"""float32 products keep float32's precision, whichever library makes them."""

from collections.abc import Iterator

import pytest
import torch

from modeling.ops import matmul
from modeling.ops.matmul import keeps_float32, set_matmul_precision


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_highest_is_float32() -> None:
    set_matmul_precision("highest", "cpu")
    assert keeps_float32()


def test_a_library_that_rounds_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = torch.Tensor.__matmul__

    def rounded(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if torch.get_float32_matmul_precision() == "medium" and a.dtype == torch.float32:
            return real(a.bfloat16().float(), b.bfloat16().float())
        return real(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", rounded)
    set_matmul_precision("highest", "cpu")
    assert torch.get_float32_matmul_precision() == "highest"
    set_matmul_precision("medium", "cpu")
    assert not keeps_float32()


@pytest.mark.parametrize(("name", "device"), [("medium", "cpu"), ("high", "cuda"), ("highest", "cuda")])
def test_what_is_asked_for_is_set(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "keeps_float32", lambda: pytest.fail("nothing to find out"))
    set_matmul_precision(name, device)
    assert torch.get_float32_matmul_precision() == name
