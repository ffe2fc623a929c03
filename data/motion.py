"""How a picture, and all that is said of places in it, moves together: cut out, turned by quarters, mirrored.

A `Motion` is drawn once for a sample, in parts of a picture's sides; on a picture of a certain size it is a `Placement`, which
moves pixels, masks and boxes alike and can bring boxes back. Whole pixels are cut out, so that picture and masks stay exactly
together.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Fractions = tuple[float, float, float, float]
"""xyxy in [0, 1] of a picture."""

WHOLE: Fractions = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Motion:
    """What happens to the pictures of a sample, in this order.

    Attributes:
        window: the part that is left of a picture.
        scale: factor of both sides.
        quarters: turns by 90 degrees against the clock.
        mirrored: left and right change places.
    """

    window: Fractions = WHOLE
    scale: float = 1.0
    quarters: int = 0
    mirrored: bool = False

    def place(self, size: tuple[int, int]) -> "Placement":
        """On a picture of that width and height."""
        width, height = size
        left, top, right, bottom = self.window
        x0, y0 = min(int(left * width), width - 1), min(int(top * height), height - 1)
        x1, y1 = max(round(right * width), x0 + 1), max(round(bottom * height), y0 + 1)
        return Placement(motion=self, original=size, window=(x0, y0, x1, y1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A motion on a picture of one size.

    Attributes:
        motion: which.
        original: width and height before.
        window: xyxy, the pixels that are left.
    """

    motion: Motion
    original: tuple[int, int]
    window: tuple[int, int, int, int]

    @property
    def scaled(self) -> tuple[int, int]:
        """Width and height of the window once it is scaled."""
        x0, y0, x1, y1 = self.window
        return max(round((x1 - x0) * self.motion.scale), 1), max(round((y1 - y0) * self.motion.scale), 1)

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """`hh ww …` -> the window's part of it."""
        x0, y0, x1, y1 = self.window
        return pixels[y0:y1, x0:x1]

    def turned(self, pixels: np.ndarray) -> np.ndarray:
        """`hh ww …`, cut and scaled -> turned and mirrored."""
        turned = np.rot90(pixels, self.motion.quarters)
        return np.ascontiguousarray(turned[:, ::-1] if self.motion.mirrored else turned)

    def box(self, xyxy: Sequence[float]) -> tuple[Fractions, float]:
        """Where a box comes to lie.

        Args:
            xyxy: in [0, 1] of the original picture.

        Returns:
            xyxy in [0, 1] of the moved picture, cut at its border, and the share of the box's area that is left.
        """
        width, height = self.original
        x0, y0, x1, y1 = self.window
        left, top, right, bottom = xyxy
        across = [(v * width - x0) / (x1 - x0) for v in (left, right)]
        down = [(v * height - y0) / (y1 - y0) for v in (top, bottom)]
        inside = [[min(max(v, 0.0), 1.0) for v in pair] for pair in (across, down)]
        area = (across[1] - across[0]) * (down[1] - down[0])
        left_of_it = (inside[0][1] - inside[0][0]) * (inside[1][1] - inside[1][0])
        corners = [self._forward(x, y) for x, y in zip(*inside, strict=True)]
        return _sorted_box(corners), left_of_it / area if area > 0 else 0.0

    def back(self, xyxy: Sequence[float]) -> Fractions:
        """A box of the moved picture, xyxy in [0, 1] -> the same of the original picture."""
        width, height = self.original
        x0, y0, x1, y1 = self.window
        corners = [self._backward(x, y) for x, y in (tuple(xyxy[:2]), tuple(xyxy[2:]))]
        return _sorted_box(
            [((x0 + x * (x1 - x0)) / width, (y0 + y * (y1 - y0)) / height) for x, y in corners]
        )

    def _forward(self, x: float, y: float) -> tuple[float, float]:
        for _ in range(self.motion.quarters % 4):
            x, y = y, 1 - x  # what was on the right is on top
        return (1 - x if self.motion.mirrored else x), y

    def _backward(self, x: float, y: float) -> tuple[float, float]:
        x = 1 - x if self.motion.mirrored else x
        for _ in range(self.motion.quarters % 4):
            x, y = 1 - y, x
        return x, y


def _sorted_box(corners: Sequence[tuple[float, float]]) -> Fractions:
    (xa, ya), (xb, yb) = corners
    return min(xa, xb), min(ya, yb), max(xa, xb), max(ya, yb)
