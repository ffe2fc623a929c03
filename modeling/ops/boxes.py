"""Boxes as xyxy."""

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    """`... 4` -> `...`; inverted boxes have area 0."""
    return (boxes[..., 2:] - boxes[..., :2]).clamp(min=0).prod(-1)


def paired_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes taken pair by pair.

    Args:
        a, b: `... 4`; to compare each with each, give them dimensions that broadcast (`q 1 4` and `1 t 4`).

    Returns:
        IoU `...` in [0, 1] and GIoU `...` in [-1, 1].

    Source: arXiv 1902.09630.
    """
    eps = 1e-9
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    overlap = box_area(torch.cat([low, high], dim=-1))
    union = box_area(a) + box_area(b) - overlap
    outer = torch.minimum(a[..., :2], b[..., :2]), torch.maximum(a[..., 2:], b[..., 2:])
    hull = box_area(torch.cat(outer, dim=-1))
    iou = overlap / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def centre_to_corners(boxes: Tensor) -> Tensor:
    """`... 4` cx cy w h -> xyxy."""
    half = boxes[..., 2:] / 2
    return torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], dim=-1)


def corners_to_centre(boxes: Tensor) -> Tensor:
    """`... 4` xyxy -> cx cy w h."""
    return torch.cat([(boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]], dim=-1)
