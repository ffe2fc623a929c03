"""Pictures against what was asked for: PSNR, and the coloured digits a judge reads in them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from train.metrics.base import SummedMetric, ratio

PSNR_CAP = 999.99
"""PSNR of two equal pictures, which is infinite: finite, so that it can be averaged and written as JSON."""

DigitColour = tuple[int, str]


def psnr(a: NDArray[np.uint8], b: NDArray[np.uint8], keep: NDArray[np.bool_] | None = None) -> float:
    """Peak signal-to-noise ratio in dB.

    Args:
        a: `hh ww c` uint8.
        b: the same shape.
        keep: `hh ww`, the pixels to compare; all if absent.

    Returns:
        dB, at most `PSNR_CAP`. With no pixel to compare, `PSNR_CAP`.

    Raises:
        ValueError: if the two shapes differ.
    """
    if a.shape != b.shape:
        raise ValueError(
            f"a picture of {a.shape} cannot be compared with one of {b.shape} (height, width, channels)"
        )
    difference = a.astype(np.float64) - b.astype(np.float64)
    if keep is not None:
        difference = difference[keep]
    error = float(np.mean(difference**2)) if difference.size else 0.0
    return min(10 * math.log10(255.0**2 / error), PSNR_CAP) if error > 0 else PSNR_CAP


def digits_match(found: Sequence[DigitColour], wanted: Sequence[DigitColour]) -> bool:
    """Whether exactly the wanted digits were found, each as often as wanted."""
    return Counter(d for d, _ in found) == Counter(d for d, _ in wanted)


def colours_match(found: Sequence[DigitColour], wanted: Sequence[DigitColour]) -> bool:
    """Whether every wanted digit has its colour.

    A misread shape is not a wrong colour: the colours found must be the wanted ones, each as often as wanted, and every digit
    that was read as often as wanted must carry its own colours.
    """
    if Counter(c for _, c in found) != Counter(c for _, c in wanted):
        return False
    seen, asked = Counter(d for d, _ in found), Counter(d for d, _ in wanted)
    readable = {d for d in asked if seen[d] == asked[d]}
    return Counter(p for p in found if p[0] in readable) == Counter(p for p in wanted if p[0] in readable)


@dataclass(kw_only=True)
class PictureFidelity(SummedMetric):
    """Mean PSNR; a missing picture counts as 0 dB."""

    psnr_sum: float = 0.0
    count: int = 0

    def update(self, predicted: NDArray[np.uint8] | None, truth: NDArray[np.uint8]) -> None:
        self.psnr_sum += 0.0 if predicted is None else psnr(predicted, truth)
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {"psnr": ratio(self.psnr_sum, self.count)}


@dataclass(kw_only=True)
class DrawnDigits(SummedMetric):
    """Share of pictures with the wanted digits, and with the wanted colours; a missing picture has neither."""

    digits_right: int = 0
    colours_right: int = 0
    count: int = 0

    def update(self, found: Sequence[DigitColour] | None, wanted: Sequence[DigitColour]) -> None:
        self.digits_right += found is not None and digits_match(found, wanted)
        self.colours_right += found is not None and colours_match(found, wanted)
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {
            "digit": ratio(self.digits_right, self.count),
            "colour": ratio(self.colours_right, self.count),
        }
