"""THE sequence layout: which tokens a segment emits, in which order, at which positions, seen by whom.

`data/packing.py` lays whole samples out with it for training; `modeling/bagel/decode.py` lays out one segment at a time
for inference. There is no second description of the order of tokens anywhere.

Source: upstream Bagel 056b5fd, measured in the golden cases (packer, inference).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from data.tokens import SpecialTokens
from data.types import EMPTY_IDS, Mode, Sample, Segment

EMPTY_WEIGHTS = torch.zeros(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayoutSpec:
    """What the layout has to know of the model.

    Attributes:
        vit_patch_size: side of a ViT patch in pixels.
        vit_positions_per_side: side of the ViT's square position table.
        latent_stride: side of a latent token in pixels (VAE stride x latent patch).
        latent_positions_per_side: side of the latent position table.
        interpolate_pos: spread each image over the whole table instead of using its upper left corner.
    """

    vit_patch_size: int = 14
    vit_positions_per_side: int = 70
    latent_stride: int = 16
    latent_positions_per_side: int = 64
    interpolate_pos: bool = False

    @staticmethod
    def from_model_dir(path: str | Path) -> "LayoutSpec":
        """Read it from the configuration files of a model directory."""

        def read(name: str, required: bool = True) -> Mapping:
            file = Path(path) / name
            if not file.is_file() and not required:
                return {}
            try:
                return json.loads(file.read_text())
            except (OSError, json.JSONDecodeError) as e:
                raise ValueError(
                    f"{file}: cannot be read ({e}); --model_path must name a model directory"
                ) from e

        bagel, vit, ae = (
            read("bagel_config.json"),
            read("vit_config.json"),
            read("ae_config.json", required=False),
        )
        if "patch_size" not in vit:
            raise ValueError(
                f"{Path(path) / 'vit_config.json'}: lacks patch_size, the side of a patch in pixels"
            )
        vae_stride = 2 ** (len(ae.get("ch_mult", (1, 2, 4, 4))) - 1)
        return LayoutSpec(
            vit_patch_size=vit["patch_size"],
            # A key that the file leaves out has the published default, as in `BagelConfig`.
            vit_positions_per_side=bagel.get("vit_max_num_patch_per_side", 70),
            latent_stride=vae_stride * bagel.get("latent_patch_size", 2),
            latent_positions_per_side=bagel.get("max_latent_size", 64),
            interpolate_pos=bagel.get("interpolate_pos", False),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLayout:
    """One segment laid out; all places count from the segment's first token.

    Attributes:
        length: tokens of the segment (0 if it was dropped).
        text_ids, text_at: `t` int64, text and marker tokens and their places.
        patch_hw: rows and columns of patches (0, 0 for text); patches stand at 1 … rows x columns.
        label_at, label_ids: `c` int64, supervised places and what each has to predict.
        label_weight: `c` float32, 1/sqrt(predictions of the text): long answers do not drown short ones; 1 for an `end_label`.
        position: `length` int64, rotary positions counted from the sample's counter.
        advance: what the sample's rotary counter grows by.
        id_offset: place of the segment's own `ids[0]`.
    """

    length: int
    text_ids: Tensor
    text_at: Tensor
    patch_hw: tuple[int, int]
    label_at: Tensor
    label_ids: Tensor
    label_weight: Tensor
    position: Tensor
    advance: int
    id_offset: int = 0


MODES: Mapping[str, Mode] = {
    "text": "causal",
    "und_image": "full",
    "cond_image": "full",
    "gen_image": "noise",
}


def patch_grid(segment: Segment, spec: LayoutSpec) -> tuple[int, int]:
    """Rows and columns of patches an image segment becomes.

    Raises:
        ValueError: if the sides are not multiples of the patch, or exceed the position table.
    """
    if segment.kind == "text":
        return 0, 0
    und = segment.kind == "und_image"
    stride = spec.vit_patch_size if und else spec.latent_stride
    side = spec.vit_positions_per_side if und else spec.latent_positions_per_side
    height, width = segment.pixels.shape[1:]
    if height % stride or width % stride or not height or not width:
        raise ValueError(
            f"{segment.kind} of {width}x{height} px is not a multiple of {stride} px; set image_stride"
        )
    rows, cols = height // stride, width // stride
    if not spec.interpolate_pos and max(rows, cols) > side:
        raise ValueError(
            f"{segment.kind} of {width}x{height} px needs a position table of {max(rows, cols)} a side, the model has "
            f"{side}; lower max_image_size to {side * stride} or set interpolate_pos"
        )
    return rows, cols


def segment_tokens(segment: Segment, spec: LayoutSpec) -> int:
    """Tokens the segment takes in a pack."""
    return 0 if segment.dropped else _undropped_tokens(segment, spec)


def _undropped_tokens(segment: Segment, spec: LayoutSpec) -> int:
    if segment.kind == "text":
        return len(segment.ids) + (0 if segment.bare else 2)
    rows, cols = patch_grid(segment, spec)
    return rows * cols + 2


def num_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Tokens the sample takes in a pack."""
    return sum(segment_tokens(s, spec) for s in sample.segments)


def planned_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Tokens the sample would take if none of its conditions had been left out."""
    return sum(_undropped_tokens(s, spec) for s in sample.segments)


def loss_tokens(sample: Sample, spec: LayoutSpec) -> int:
    """Predictions that the sample is trained on: of its texts' tokens, of what follows a segment, of noised patches."""
    total = 0
    for segment in sample.segments:
        if segment.dropped:
            continue
        if segment.kind == "gen_image":
            rows, cols = patch_grid(segment, spec)
            total += rows * cols
        elif segment.kind == "text" and segment.supervised and not segment.bare:
            total += len(segment.ids) + 1
        total += segment.end_label is not None
    return total


@dataclass(frozen=True, slots=True)
class Splits:
    """The spans of a sequence that attend as one, in order."""

    lens: tuple[int, ...]
    modes: tuple[Mode, ...]
    branches: tuple[int, ...]


def splits_of(sample: Sample, spec: LayoutSpec) -> Splits:
    """A split per segment that has tokens; the frames of a video are one."""
    lens: list[int] = []
    modes: list[Mode] = []
    branches: list[int] = []
    for segment in sample.segments:
        length = segment_tokens(segment, spec)
        if length and segment.same_split and lens:
            lens[-1] += length
        elif length:
            lens.append(length)
            modes.append(segment_mode(segment))
            branches.append(segment.branch)
    return Splits(tuple(lens), tuple(modes), tuple(branches))


def visible_pairs(
    sample_lens: Sequence[int],
    split_lens: Sequence[int],
    split_modes: Sequence[str],
    split_branches: Sequence[int],
) -> int:
    """How many (query, key) pairs of a pack see each other, by the rule of `modeling/ops/attention.py`."""
    splits = zip(split_lens, split_modes, split_branches, strict=True)
    pairs = 0
    for length in sample_lens:
        seen: dict[int, int] = {}
        while length > 0:
            own, mode, branch = next(splits)
            context = seen.get(0, 0) + (seen.get(branch, 0) if branch else 0)
            pairs += own * context + (own * (own + 1) // 2 if mode == "causal" else own * own)
            if mode != "noise":
                seen[branch] = seen.get(branch, 0) + own
            length -= own
    return pairs


def segment_mode(segment: Segment) -> Mode:
    """How the segment's split attends. Frames of a video see each other, and are seen."""
    return MODES[segment.kind] if segment.frame_delta is None else "full"


def lay_out(segment: Segment, spec: LayoutSpec, special: SpecialTokens) -> SegmentLayout:
    """Tokens, positions and labels of one segment."""
    if segment.dropped:
        # A left-out image keeps its rotary position as a gap; a left-out text leaves none.
        advance = 0 if segment.kind == "text" else 1
        return SegmentLayout(
            length=0, text_ids=EMPTY_IDS, text_at=EMPTY_IDS, patch_hw=(0, 0), label_at=EMPTY_IDS,
            label_ids=EMPTY_IDS, label_weight=EMPTY_WEIGHTS, position=EMPTY_IDS, advance=advance,
        )  # fmt: skip
    if segment.kind == "text":
        return _lay_out_text(segment, special)
    rows, cols = patch_grid(segment, spec)
    length = rows * cols + 2
    # What follows a noised image takes its place: at inference the finished image is encoded again, clean, at this position.
    advance = 0 if segment.kind == "gen_image" else 1
    end_label = EMPTY_IDS if segment.end_label is None else torch.tensor([segment.end_label])
    return SegmentLayout(
        length=length,
        text_ids=torch.tensor([special.image_start, special.image_end]),
        text_at=torch.tensor([0, length - 1]),
        patch_hw=(rows, cols),
        label_at=torch.full_like(end_label, length - 1),
        label_ids=end_label,
        label_weight=torch.ones(len(end_label)),
        position=torch.zeros(length, dtype=torch.int64),
        advance=advance if segment.frame_delta is None else segment.frame_delta,
    )


def _lay_out_text(segment: Segment, special: SpecialTokens) -> SegmentLayout:
    ids = segment.ids
    if not segment.bare:
        ids = torch.cat([ids.new_tensor([special.begin]), ids, ids.new_tensor([special.end])])
    at = torch.arange(len(ids))
    labelled = segment.supervised and not segment.bare
    label_at, label_ids = (at[:-1], ids[1:]) if labelled else (EMPTY_IDS, EMPTY_IDS)
    # Weight of each of n+1 predictions, n = tokens of the text.
    weight = torch.full((len(label_ids),), max(1, len(label_ids)) ** -0.5)
    if segment.end_label is not None:
        label_at = torch.cat([label_at, at[-1:]])
        label_ids = torch.cat([label_ids, label_ids.new_tensor([segment.end_label])])
        weight = torch.cat([weight, torch.ones(1)])
    return SegmentLayout(
        length=len(ids),
        text_ids=ids,
        text_at=at,
        patch_hw=(0, 0),
        label_at=label_at,
        label_ids=label_ids,
        label_weight=weight,
        position=at,
        advance=len(ids),
        id_offset=0 if segment.bare else 1,
    )


def grid_position(rows: int, cols: int, side: int, interpolate: bool) -> Tensor:
    """Places of an image's patches in a square 2-D position table.

    Returns:
        `(rows cols)` int64, row-major: `row * side + column`.
    """
    if interpolate:
        # Each axis is cut into `side` equal bins; a patch takes the bin of its upper left corner.
        row = (torch.arange(rows) * side) // rows
        col = (torch.arange(cols) * side) // cols
    else:
        row, col = torch.arange(rows), torch.arange(cols)
    return (row[:, None] * side + col[None, :]).flatten()
