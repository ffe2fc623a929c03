"""Perception heads: they read the state of an anchor and its picture's feature grid, and know nothing of the trunk.

To add a head: one file here, one row in HEADS. A row is an implementation; what it predicts (`box`, `mask`) is what regions,
losses and anchor tokens (`data/tokens.py` ANCHORS) speak of. `bagel_config.json` chooses, `"heads": {"mask": {"type": "sam"}}`;
without `type` it is the row of the prediction's own name.
"""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from modeling.heads.box import BoxHead
from modeling.heads.box_embedding import BoxEmbeddingHead
from modeling.heads.detr import DetrHead
from modeling.heads.head import PerceptionHead
from modeling.heads.mask import MaskHead
from modeling.heads.mask_autoencoder import MaskAutoencoderHead
from modeling.heads.sam_mask import SamMaskHead

HEADS: dict[str, type[PerceptionHead]] = {
    "box": BoxHead,
    "embedding": BoxEmbeddingHead,
    "mask": MaskHead,
    "sam": SamMaskHead,
    "autoencoder": MaskAutoencoderHead,
    "detr": DetrHead,
}


def head_class(name: str, options: Mapping[str, Any]) -> type[PerceptionHead]:
    """The implementation that an entry of `heads` asks for.

    Args:
        name: what is predicted.
        options: of the entry.

    Raises:
        ValueError: if there is no such type, it predicts something else, or has no such option.
    """
    where, kind = f"bagel_config.json: heads.{name}", options.get("type", name)
    known = ", ".join(key for key, row in HEADS.items() if row.predicts == name)
    if kind not in HEADS:
        raise ValueError(
            f"{where}: no head of type {kind!r}; known types are {known or ', '.join(HEADS)}"
            + (
                ""
                if known
                else f", of the predictions {', '.join(sorted({h.predicts for h in HEADS.values()}))}"
            )
        )
    row = HEADS[kind]
    if row.predicts != name:
        raise ValueError(
            f"{where}: type {kind!r} predicts {row.predicts!r}; "
            + (f"{name!r} has {known}" if known else f"call it {row.predicts}")
        )
    for key in options:
        if key != "type" and key not in row.options():
            near = get_close_matches(key, row.options(), n=1, cutoff=0.0)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{where}: type {kind!r} has no option {key!r}{hint}")
    return row


def build_head(name: str, options: Mapping[str, Any], **sizes: int) -> PerceptionHead:
    """The head of an entry of `heads`.

    Args:
        name: what is predicted.
        options: of the entry.
        **sizes: `hidden_size` and `grid_size`, the widths of states and grid; `patch_size` in pixels.

    Raises:
        ValueError: as `head_class`, or if the head refuses a value.
    """
    chosen = {key: value for key, value in options.items() if key != "type"}
    return head_class(name, options)(**sizes, **chosen)


__all__ = ["HEADS", "PerceptionHead", "build_head", "head_class"]
