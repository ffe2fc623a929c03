"""Image transforms by name: a picture goes in, uint8 pixels come out.

A transform is one file and one row in `TRANSFORMS`. The YAML blocks `image_transform_args` (VAE), `vit_image_transform_args`
(ViT) and `head_image_transform_args` (an encoder inside a perception head) are its keyword arguments; `type:` chooses the row,
and `image` is meant where it is left out.
"""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from data.transforms.image import ImageTransform
from data.transforms.longest import LongestSide

TRANSFORMS: dict[str, Callable[..., Any]] = {
    "image": ImageTransform,
    "sam": LongestSide,
}


def build_transform(args: Mapping[str, Any]) -> Any:
    """Build the transform that a YAML block describes, a row of TRANSFORMS.

    Raises:
        ValueError: if the type or a key is unknown (the nearest one is named), or a value makes no sense.
    """
    options = dict(args)
    name = options.pop("type", "image")
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform type {name!r}; known: {', '.join(TRANSFORMS)}")
    if "image_stride" in options:
        if "stride" in options:
            raise ValueError("image_stride and stride are two spellings of one key; give one of them")
        options["stride"] = options.pop("image_stride")
    parameters = inspect.signature(TRANSFORMS[name]).parameters
    for key in options:
        if key not in parameters:
            near = get_close_matches(key, [*parameters, "image_stride"], n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown transform key {key!r}; did you mean {near!r}?")
    missing = [key for key, p in parameters.items() if p.default is p.empty and key not in options]
    if missing:
        raise ValueError(f"the transform lacks {', '.join(missing)}")
    return TRANSFORMS[name](**options)


__all__ = ["TRANSFORMS", "ImageTransform", "LongestSide", "build_transform"]
