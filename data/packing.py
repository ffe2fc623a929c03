"""Samples -> PackedBatch: pure, no random choice, no state.

Which samples share a pack is decided in `data/policy.py`; the order of tokens in `data/layout.py`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.layout import LayoutSpec, SegmentLayout, Splits, grid_position, lay_out, splits_of
from data.tokens import SpecialTokens
from data.types import (
    EMPTY_IDS,
    ROLES,
    LaneCursor,
    Mode,
    PackedBatch,
    Region,
    RegionBatch,
    Reject,
    Sample,
    Segment,
)

FACTORS = np.frombuffer(hashlib.shake_128(b"weft").digest(8 * 512), "<u8") | np.uint64(1)
"""Odd numbers without a pattern."""

OF_THE_RUN = ("origins", "tasks", "cursor", "rejects", "hash")
"""Fields of a pack that say where it comes from, not what is in it."""


def pack(
    samples: Sequence[Sample],
    spec: LayoutSpec,
    special: SpecialTokens,
    *,
    position_start: Sequence[int] | None = None,
    cursor: LaneCursor = LaneCursor(lane=0),  # noqa: B008 - frozen
    rejects: tuple[Reject, ...] = (),
) -> PackedBatch:
    """Lay samples end to end in one sequence.

    Args:
        samples: what to pack; may be empty.
        spec: patch sizes and position tables of the model.
        special: ids of the tokens with a role.
        position_start: rotary counter each sample starts with (0; at inference what its context has used).
        cursor: the lane's state once this pack is consumed.
        rejects: records found unusable on the way to this pack.

    Raises:
        ValueError: if an image does not fit the patch grid or the position table, or a region names a wrong segment.
    """
    out = _Fields(spec)
    sample_lens: list[int] = []
    for i, sample in enumerate(samples):
        start = out.length
        # Rotary counter of the trunk (0) and of each branch, which starts where the trunk stands.
        counter = {0: position_start[i] if position_start is not None else 0}
        token_of: list[int] = []  # first of a text, closing one of a picture
        image_of: list[int] = []
        for segment in sample.segments:
            layout = lay_out(segment, spec, special)
            token_of.append(out.length + (layout.id_offset if segment.kind == "text" else layout.length - 1))
            image_of.append(len(out.und_hw) if segment.kind == "und_image" and not segment.dropped else -1)
            position = counter.setdefault(segment.branch, counter[0])
            out.add(segment, layout, position)
            counter[segment.branch] = position + layout.advance
        for region in sample.regions:
            out.add_region(region, token_of, image_of, sample)
        out.add_splits(splits_of(sample, spec))
        sample_lens.append(out.length - start)
    return out.batch(
        sample_lens=tuple(sample_lens),
        origins=tuple(s.origin for s in samples),
        tasks=tuple(s.task for s in samples),
        cursor=cursor,
        rejects=rejects,
    )


def patchify_pixels(pixels: Tensor, patch_size: int) -> Tensor:
    """`3 (rows p) (cols p)` -> `(rows cols) (p p 3)`: row-major patches, channel fastest."""
    return _patch_grid(pixels, patch_size).reshape(-1, patch_size * patch_size * len(pixels))


def _patch_grid(pixels: Tensor, patch_size: int) -> Tensor:
    """`3 (rows p) (cols p)` -> `rows cols p p 3`, nothing copied."""
    return pixels.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).permute(1, 3, 2, 4, 0)


def _all_patches(pictures: Sequence[Tensor], patch_size: int) -> Tensor:
    """`v (p p 3)`: the patches of all pictures. They are most of a pack, so each pixel is copied once, to its place."""
    counts = [p.shape[1] // patch_size * (p.shape[2] // patch_size) for p in pictures]
    dtype = pictures[0].dtype if pictures else torch.uint8
    patches = torch.empty(sum(counts), 3 * patch_size**2, dtype=dtype)
    for picture, place in zip(pictures, patches.split(counts), strict=True):
        grid = _patch_grid(picture, patch_size)
        place.view(grid.shape).copy_(grid)
    return patches


def content_key(pixels: Tensor) -> int:
    """Hash of an image's pixels and shape, for the latent cache."""
    digest = hashlib.blake2b(
        pixels.contiguous().numpy().tobytes(), digest_size=8, key=str(tuple(pixels.shape)).encode()
    )
    return int.from_bytes(digest.digest(), "little", signed=True)


def content_hash(batch: PackedBatch) -> str:
    """Hash of every tensor of a pack, and of its layout. Pictures for the VAE are in it by their own hashes, `gen_key`."""
    digest = hashlib.blake2b(digest_size=16)
    for f in fields(batch):
        value = getattr(batch, f.name)
        if f.name == "regions":
            for head in sorted(value):
                for part in fields(value[head]):
                    _add(digest, f"{head}.{part.name}", getattr(value[head], part.name))
        elif f.name == "und_views":
            for view in value:
                _add(digest, f.name, view)
        elif f.name not in (*OF_THE_RUN, "gen_pixels"):
            _add(digest, f.name, value)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Tensor | tuple[Any, ...]) -> None:
    if not isinstance(value, Tensor):
        digest.update(f"{name} {value}\n".encode())
        return
    digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
    content = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    whole = len(content) // (8 * len(FACTORS)) * (8 * len(FACTORS))
    blocks = content[:whole].view(np.uint64).reshape(-1, len(FACTORS))
    # 4 KiB become 8 bytes: a twentieth of the time that hashing all of it takes, and a changed byte changes the sum.
    digest.update(np.einsum("ij,j->i", blocks, FACTORS))
    digest.update(content[whole:])


class _Fields:
    """The columns of a pack while it is being filled."""

    def __init__(self, spec: LayoutSpec) -> None:
        self.spec = spec
        self.length = 0
        self.text_ids: list[Tensor] = []
        self.text_index: list[Tensor] = []
        self.position: list[Tensor] = []
        self.label_ids: list[Tensor] = []
        self.label_index: list[Tensor] = []
        self.label_weight: list[Tensor] = []
        self.label_role: list[Tensor] = []
        self.und_pixels: list[Tensor] = []
        self.und_position: list[Tensor] = []
        self.und_index: list[Tensor] = []
        self.und_hw: list[tuple[int, int]] = []
        self.und_views: list[Tensor] = []
        self.gen_pixels: list[Tensor] = []
        self.gen_hw: list[tuple[int, int]] = []
        self.gen_position: list[Tensor] = []
        self.gen_index: list[Tensor] = []
        self.gen_timestep: list[Tensor] = []
        self.gen_seed: list[int] = []
        self.regions: dict[str, list[tuple[int, int, Region]]] = {}
        self.split_lens: list[int] = []
        self.split_modes: list[Mode] = []
        self.split_branches: list[int] = []

    def add(self, segment: Segment, layout: SegmentLayout, counter: int) -> None:
        if not layout.length:
            return
        self.text_ids.append(layout.text_ids)
        self.text_index.append(layout.text_at + self.length)
        self.position.append(layout.position + counter)
        self.label_ids.append(layout.label_ids)
        self.label_index.append(layout.label_at + self.length)
        self.label_weight.append(layout.label_weight)
        self.label_role.append(torch.full_like(layout.label_ids, ROLES.index(segment.role)))
        if segment.kind != "text":
            self._add_patches(segment, layout.patch_hw)
        self.length += layout.length

    def add_splits(self, splits: Splits) -> None:
        self.split_lens += splits.lens
        self.split_modes += splits.modes
        self.split_branches += splits.branches

    def _add_patches(self, segment: Segment, hw: tuple[int, int]) -> None:
        spec = self.spec
        index = torch.arange(hw[0] * hw[1]) + self.length + 1
        if segment.kind == "und_image":
            self.und_pixels.append(segment.pixels)
            self.und_position.append(grid_position(*hw, spec.vit_positions_per_side, spec.interpolate_pos))
            self.und_index.append(index)
            self.und_hw.append(hw)
            self.und_views.append(segment.view)
            return
        self.gen_pixels.append(segment.pixels)
        self.gen_hw.append(hw)
        self.gen_position.append(grid_position(*hw, spec.latent_positions_per_side, spec.interpolate_pos))
        self.gen_index.append(index)
        self.gen_timestep.append(
            torch.full((len(index),), segment.timestep if segment.kind == "gen_image" else 0.0)
        )
        self.gen_seed.append(segment.noise_seed)

    def add_region(self, region: Region, token_of: list[int], image_of: list[int], sample: Sample) -> None:
        anchoring = sample.segments[region.segment]
        seen = region.segment == region.image or anchoring.kind == "text"
        if anchoring.dropped or not seen or image_of[region.image] < 0:
            raise ValueError(
                f"{sample.origin.where}: region '{region.name}' needs its anchor and its understanding image in the sample; "
                "a text with anchors and a picture with regions cannot be droppable"
            )
        anchor = token_of[region.segment] + region.token
        self.regions.setdefault(region.head, []).append((anchor, image_of[region.image], region))

    def batch(self, **rest) -> PackedBatch:
        return PackedBatch(
            text_ids=_cat(self.text_ids),
            text_index=_cat(self.text_index),
            position=_cat(self.position),
            label_ids=_cat(self.label_ids),
            label_index=_cat(self.label_index),
            label_weight=_cat(self.label_weight, torch.zeros(0)),
            label_role=_cat(self.label_role),
            und_patches=_all_patches(self.und_pixels, self.spec.vit_patch_size),
            und_position=_cat(self.und_position),
            und_index=_cat(self.und_index),
            und_hw=torch.tensor(self.und_hw, dtype=torch.int64).reshape(-1, 2),
            und_views=tuple(self.und_views),
            gen_pixels=tuple(self.gen_pixels),
            gen_hw=torch.tensor(self.gen_hw, dtype=torch.int64).reshape(-1, 2),
            gen_position=_cat(self.gen_position),
            gen_index=_cat(self.gen_index),
            gen_timestep=_cat(self.gen_timestep, torch.zeros(0)),
            gen_seed=torch.tensor(self.gen_seed, dtype=torch.int64),
            gen_key=torch.tensor([content_key(p) for p in self.gen_pixels], dtype=torch.int64),
            regions={head: _collate_regions(r) for head, r in self.regions.items()},
            split_lens=tuple(self.split_lens),
            split_modes=tuple(self.split_modes),
            split_branches=tuple(self.split_branches),
            **rest,
        )


def _collate_regions(regions: list[tuple[int, int, Region]]) -> RegionBatch:
    return RegionBatch(
        anchor=torch.tensor([a for a, _, _ in regions]),
        image=torch.tensor([i for _, i, _ in regions]),
        boxes=torch.cat([r.boxes for _, _, r in regions]).float(),
        num_boxes=torch.tensor([len(r.boxes) for _, _, r in regions]),
        phrase_ids=_cat([ids for _, _, r in regions for ids in r.phrases]),
        phrase_lens=torch.tensor([n for _, _, r in regions for n in _phrase_lens(r)], dtype=torch.int64),
        mask_values=torch.cat([r.mask.flatten() for _, _, r in regions]),
        mask_hw=torch.tensor([r.mask.shape for _, _, r in regions], dtype=torch.int64).reshape(-1, 2),
    )


def _phrase_lens(region: Region) -> list[int]:
    return [len(ids) for ids in region.phrases] or [0] * len(region.boxes)


def _cat(parts: list[Tensor], empty: Tensor = EMPTY_IDS) -> Tensor:
    return torch.cat(parts) if parts else empty
