"""Packed patches to pictures of one size, and back."""

import pytest
import torch

from data.packing import patchify_pixels
from modeling.ops.patch import images_by_size, patchify_latent, unpatchify_latent

PATCH = 4
HW = ((2, 3), (1, 1), (3, 2), (2, 3))


def test_pictures_of_one_size_come_together_and_every_patch_once() -> None:
    pictures = [torch.rand(3, h * PATCH, w * PATCH) for h, w in HW]
    patches = torch.cat([patchify_pixels(p, PATCH) for p in pictures])
    groups = list(images_by_size(patches, HW, PATCH))
    assert [tuple(pixels.shape) for _, pixels in groups] == [(1, 3, 4, 4), (2, 3, 8, 12), (1, 3, 12, 8)]
    for (_, pixels), which in zip(groups, [(1,), (0, 3), (2,)], strict=True):
        assert torch.equal(pixels, torch.stack([pictures[i] for i in which]))
    # Counting over all pictures, where each group's patches stand in the pack.
    assert [place.tolist() for place, _ in groups] == [
        [6],
        [0, 1, 2, 3, 4, 5, 13, 14, 15, 16, 17, 18],
        [7, 8, 9, 10, 11, 12],
    ]


def test_without_pictures_there_is_one_group_of_nothing_that_stays_in_the_graph() -> None:
    patches = torch.zeros(0, 3 * PATCH**2, requires_grad=True)
    ((place, pixels),) = images_by_size(patches, (), PATCH)
    assert place.shape == (0,) and place.dtype == torch.int64
    assert pixels.shape == (0, 3, PATCH, PATCH)
    pixels.sum().backward()
    assert patches.grad is not None


@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (2, 3)])
def test_latent_patches_go_back_where_they_came_from(rows: int, cols: int) -> None:
    latent = torch.rand(5, rows * 2, cols * 2)
    tokens = patchify_latent(latent, 2)
    assert tokens.shape == (rows * cols, 20)
    assert torch.equal(tokens[0], latent[:, :2, :2].permute(1, 2, 0).flatten())
    assert torch.equal(unpatchify_latent(tokens, rows, cols, 2), latent)
