"""SAM's resize: the longer side becomes one fixed size, the other follows; padding is the model's affair."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data.rgb_image import RgbImage


@dataclass(frozen=True, slots=True)
class LongestSide:
    """A picture whose longer side is `image_size`, enlarged or reduced; bilinear, smoothed where it shrinks.

    Attributes:
        image_size: in pixels, the side of the square that the encoder takes.

    Raises:
        ValueError: if it is not a positive whole number.
    """

    image_size: int

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or isinstance(self.image_size, bool) or self.image_size < 1:
            raise ValueError(f"image_size must be a positive whole number, not {self.image_size!r}")

    def __call__(self, image: RgbImage | Image.Image, num_images: int = 1) -> Tensor:
        """`3 hh ww` uint8, channels last in memory; `num_images` changes nothing."""
        picture = image if isinstance(image, RgbImage) else RgbImage.of(image)
        size = self.resized(*picture.size)
        shown = Image.fromarray(picture.rgb).resize(size, Image.Resampling.BILINEAR)
        return torch.from_numpy(np.array(shown)).permute(2, 0, 1)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height after it. At least 1: of a picture that is very long, SAM's own rule leaves nothing."""
        scale = self.image_size / max(width, height)
        return max(1, int(width * scale + 0.5)), max(1, int(height * scale + 0.5))
