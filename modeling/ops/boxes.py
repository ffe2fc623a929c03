"""Boxes as xyxy."""

import torch
from torch import Tensor


def box_area(boxes: Tensor) -> Tensor:
    """`r 4` -> `r`; inverted boxes have area 0."""
    return (boxes[:, 2] - boxes[:, 0]).clamp(min=0) * (boxes[:, 3] - boxes[:, 1]).clamp(min=0)


def paired_giou(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """IoU and generalised IoU of boxes taken pair by pair.

    Args:
        a, b: `r 4`.

    Returns:
        IoU `r` in [0, 1] and GIoU `r` in [-1, 1].

    Source: arXiv 1902.09630.
    """
    eps = 1e-9
    low, high = torch.maximum(a[:, :2], b[:, :2]), torch.minimum(a[:, 2:], b[:, 2:])
    overlap = box_area(torch.cat([low, high], dim=1))
    union = box_area(a) + box_area(b) - overlap
    hull = box_area(torch.cat([torch.minimum(a[:, :2], b[:, :2]), torch.maximum(a[:, 2:], b[:, 2:])], dim=1))
    iou = overlap / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)


def centre_to_corners(boxes: Tensor) -> Tensor:
    """`r 4` cx cy w h -> xyxy."""
    half = boxes[:, 2:] / 2
    return torch.cat([boxes[:, :2] - half, boxes[:, :2] + half], dim=1)
