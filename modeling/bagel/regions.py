"""What the perception heads say, in pixels of the picture that was seen."""

from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray

from modeling.types import HeadOutput

Box = tuple[float, float, float, float]


def regions_of(
    heads: Sequence[tuple[str, HeadOutput]], size: tuple[int, int]
) -> tuple[list[Box], list[NDArray[np.bool_]]]:
    """Boxes and masks at the size of a picture, each in the order written.

    Args:
        heads: name and output of one head per anchor (`Decoder.perceive`).
        size: width and height of the picture.

    Returns:
        boxes xyxy in pixels, and masks `hh ww`.
    """
    width, height = size
    boxes: list[Box] = []
    masks: list[NDArray[np.bool_]] = []
    for head, output in heads:
        if head == "box":
            x0, y0, x1, y1 = output.boxes[0].tolist()
            boxes.append((x0 * width, y0 * height, x1 * width, y1 * height))
        if head == "mask":
            masks.append(_mask(output, width, height))
    return boxes, masks


def _mask(output: HeadOutput, width: int, height: int) -> NDArray[np.bool_]:
    """Logits at the transformed size -> mask at the original size; one bilinear step, as nothing was padded or cropped."""
    logits = output.mask_logits.reshape(1, 1, *output.mask_hw[0])
    if tuple(logits.shape[2:]) != (height, width):
        logits = F.interpolate(logits, size=(height, width), mode="bilinear")
    return (logits[0, 0] > 0).cpu().numpy()
