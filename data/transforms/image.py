"""A picture of any mode and size becomes `3 hh ww` uint8 pixels whose sides are multiples of a stride.

The resize rule is the published one (tests/parity holds it against a table of the published code's sizes),
so that a checkpoint sees the sizes it was trained with. Pixels stay uint8: `(x / 255 - 0.5) / 0.5` happens on the device.
"""

from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from data.rgb_image import RgbImage
from data.transforms.resize import resize

MAX_PIXELS = 14 * 14 * 9 * 1024
"""Published default of `max_pixels`."""


@dataclass(frozen=True, slots=True)
class ImageTransform:
    """Resize to between `min_image_size` and `max_image_size`, both sides multiples of `stride`; no crop.

    Attributes:
        max_image_size: the longer side is at most this.
        min_image_size: the shorter side is at least this, where the longer one allows it.
        stride: pixels per patch (ViT) or per latent token (VAE).
        max_pixels: area that all the pictures of one sample share.

    Raises:
        ValueError: if a size is not a positive number, the limits cross, or the stride exceeds the larger one.
    """

    max_image_size: int
    min_image_size: int
    stride: int
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive whole number, not {value!r}")
        if self.min_image_size > self.max_image_size:
            raise ValueError(
                f"min_image_size {self.min_image_size} exceeds max_image_size {self.max_image_size}"
            )
        if self.stride > self.max_image_size:
            raise ValueError(f"stride {self.stride} exceeds max_image_size {self.max_image_size}")

    def __call__(self, image: RgbImage | Image.Image, num_images: int = 1) -> Tensor:
        """`3 hh ww` uint8, channels last in memory: so decoders give it, and so patches want it.

        Args:
            image: any mode; transparency is put on white.
            num_images: how many pictures the sample has (they share `max_pixels`).
        """
        picture = image if isinstance(image, RgbImage) else RgbImage.of(image)
        rgb = resize(picture.rgb, *self.resized(*picture.size, num_images))
        return torch.from_numpy(rgb).permute(2, 0, 1)

    def resized(self, width: int, height: int, num_images: int = 1) -> tuple[int, int]:
        """Width and height after the transform.

        Source: upstream BAGEL's resize rule, sizes of commit 056b5fd.
        """
        scale = max(
            min(self.max_image_size / max(width, height), 1.0), self.min_image_size / min(width, height)
        )
        width, height = self._scaled(width, height, scale)
        budget = self.max_pixels / num_images
        if width * height > budget:
            # A ratio of areas used on lengths overshoots downwards; published checkpoints were trained with it.
            width, height = self._scaled(width, height, budget / (width * height))
        if max(width, height) > self.max_image_size:
            width, height = self._scaled(width, height, self.max_image_size / max(width, height))
        return width, height

    def _scaled(self, width: int, height: int, scale: float) -> tuple[int, int]:
        return self._to_stride(round(width * scale)), self._to_stride(round(height * scale))

    def _to_stride(self, side: int) -> int:
        return max(self.stride, round(side / self.stride) * self.stride)
