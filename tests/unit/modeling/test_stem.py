"""The convolutional stem of the vision tower: each picture as if alone, and nothing needs a picture to be there."""

import pytest
import torch

from modeling.siglip.stem import ConvStem

PATCH = 8
HW = ((2, 3), (1, 1), (4, 2), (2, 3), (3, 2))


def make_stem() -> ConvStem:
    torch.manual_seed(0)
    return ConvStem(channels=3, patch_size=PATCH, width=16, out=12)


def test_sizes_mixed_give_what_each_picture_gives_alone() -> None:
    stem = make_stem()
    alone = [torch.rand(h * w, 3 * PATCH**2) for h, w in HW]
    with torch.no_grad():
        together = stem(torch.cat(alone), HW)
        one_by_one = torch.cat([stem(patches, (hw,)) for patches, hw in zip(alone, HW, strict=True)])
    assert together.shape == (sum(h * w for h, w in HW), 12)
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-6)


def test_a_patch_sees_its_neighbours_and_no_other_picture() -> None:
    stem = make_stem()
    patches = torch.rand(8, 3 * PATCH**2, requires_grad=True)
    stem(patches, ((1, 4), (2, 2)))[1].square().sum().backward()
    assert patches.grad is not None
    seen = patches.grad.abs().sum(1) > 0
    assert seen[:3].all() and not seen[4:].any()


def test_without_pictures_every_parameter_has_a_gradient_of_zero() -> None:
    stem = make_stem()
    out = stem(torch.zeros(0, 3 * PATCH**2), ())
    assert out.shape == (0, 12)
    out.sum().backward()
    for name, parameter in stem.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("patch_size", [6, 14])
def test_a_patch_size_that_is_no_power_of_two_is_refused(patch_size: int) -> None:
    with pytest.raises(ValueError, match=f"stem_width 16: .*power of two, not {patch_size}"):
        ConvStem(3, patch_size, 16, 12)
