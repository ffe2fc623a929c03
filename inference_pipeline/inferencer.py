"""Prompts in, answers and pictures out, batched, through the KV cache.

    model = Inferencer.from_model_dir("runs/quickstart/results_dir/model")
    model.answer([Prompt(images=("scene.png",), text="Where is the red 7?")])[0].boxes

Prompts of one call may differ in length and picture size; each gives what it would give alone.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from data.conversation import image_segment, prompt_segments
from data.tokens import Tokenizer
from data.transforms.image import ImageTransform, to_rgb
from data.types import Kind, Segment
from modeling.autoencoder import load_autoencoder
from modeling.bagel.decode import Context, Decoder, DrawOptions, Renorm, Written
from modeling.bagel.latents import LatentEncoder
from modeling.build import load_model
from modeling.types import HeadOutput

PUBLISHED_TRANSFORMS: dict[str, dict[str, int]] = {
    "vae": {"max_image_size": 1024, "min_image_size": 512, "stride": 16},
    "vit": {"max_image_size": 980, "min_image_size": 224, "stride": 14},
}
"""What pictures go through if the model directory has no `preprocessor_config.json`."""

Picture = Image.Image | Path | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is asked: the pictures stand at the text's `<image>`s, or first if it has none.

    `answer_first`: before drawing, let the model write its answer text.
    """

    text: str
    images: tuple[Picture, ...] = ()
    answer_first: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What was said. Boxes are xyxy in pixels of the last picture given, masks bool at its size, both in the order written."""

    text: str
    boxes: list[tuple[float, float, float, float]]
    masks: list[NDArray[np.bool_]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What was drawn, and the answer text if one was asked for first."""

    image: Image.Image
    text: str


class Inferencer:
    """A trained model with its tokenizer, transforms and VAE."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        vit_transform: ImageTransform,
        vae_transform: ImageTransform,
    ):
        self.decoder, self.tokenizer = decoder, tokenizer
        self._transforms = {"und_image": vit_transform, "cond_image": vae_transform}

    @staticmethod
    def from_model_dir(
        path: str | Path, weights: str = "ema", device: str | torch.device = "cpu"
    ) -> "Inferencer":
        """Load a model directory in the published layout.

        Raises:
            ValueError: naming the file that is missing or does not fit.
        """
        model = load_model(path, weights, device)
        tokenizer = Tokenizer(path)
        encoder = LatentEncoder(load_autoencoder(path, device), model.config.latent_patch_size, cache_mb=64)
        decoder = Decoder(model, encoder, model.config.layout, tokenizer.special)
        transforms = _read_transforms(Path(path) / "preprocessor_config.json")
        return Inferencer(decoder, tokenizer, transforms["vit"], transforms["vae"])

    def answer(self, requests: Sequence[Prompt], max_new_tokens: int = 512) -> list[Answer]:
        """Let the model answer in text; boxes and masks come where it writes `<BOX>` and `<SEG>` itself."""
        pictures = [tuple(_open(p) for p in r.images) for r in requests]
        prompts = [
            self._prompt(r.text, seen, ("und_image",)) for r, seen in zip(requests, pictures, strict=True)
        ]
        context = self._read(prompts)
        written = self.decoder.write(context, max_new_tokens)
        found = self.decoder.perceive(context, written)
        return [
            _answer(self.tokenizer.decode(w.ids, keep_special=True), heads, seen)
            for w, heads, seen in zip(written, found, pictures, strict=True)
        ]

    def generate(
        self,
        requests: Sequence[Prompt],
        *,
        height: int,
        width: int,
        num_timesteps: int = 50,
        cfg_text_scale: float = 4.0,
        cfg_img_scale: float = 1.0,
        cfg_interval: tuple[float, float] = (0.0, 1.0),
        cfg_renorm_min: float = 0.0,
        cfg_renorm_type: Renorm = "global",
        timestep_shift: float = 1.0,
        seed: int = 0,
        max_new_tokens: int = 512,
    ) -> list[Generation]:
        """Draw one picture per prompt: from text alone, or an edit of the pictures given.

        Args:
            requests: what to draw.
            height, width: of the pictures drawn, in pixels.
            num_timesteps, timestep_shift, cfg_text_scale, cfg_img_scale, cfg_interval, cfg_renorm_min, cfg_renorm_type:
                see `DrawOptions`.
            seed: of the first picture; the others count on from it.
            max_new_tokens: of answers written first.
        """
        options = DrawOptions(
            num_timesteps=num_timesteps,
            timestep_shift=timestep_shift,
            cfg_text_scale=cfg_text_scale,
            cfg_img_scale=cfg_img_scale,
            cfg_interval=cfg_interval,
            cfg_renorm_min=cfg_renorm_min,
            cfg_renorm_type=cfg_renorm_type,
        )
        pictures = [tuple(_open(p) for p in r.images) for r in requests]
        roles: tuple[Kind, ...] = ("cond_image", "und_image")
        prompts = [self._prompt(r.text, seen, roles) for r, seen in zip(requests, pictures, strict=True)]
        context = self._read(prompts)
        without_text = self._read([_without_last_text(p) for p in prompts]) if cfg_text_scale > 1 else None
        without_images = (
            self._read([[s for s in p if s.kind == "text"] for p in prompts]) if cfg_img_scale > 1 else None
        )
        texts = self._write_first(context, [r.answer_first for r in requests], max_new_tokens)
        images = self.decoder.draw(
            context,
            [(height, width)] * len(requests),
            [seed + i for i in range(len(requests))],
            options,
            without_text,
            without_images,
        )
        return [Generation(image=_to_image(i), text=t) for i, t in zip(images, texts, strict=True)]

    def _write_first(self, context: Context, wanted: Sequence[bool], max_new_tokens: int) -> list[str]:
        if not any(wanted):
            return [""] * len(wanted)
        if not all(wanted):
            raise ValueError(
                "prompts that write first and prompts that draw at once cannot share a batch; ask them apart"
            )
        written: list[Written] = self.decoder.write(context, max_new_tokens)
        return [self.tokenizer.decode(w.ids) for w in written]

    def _prompt(self, text: str, seen: Sequence[Image.Image], roles: Sequence[Kind]) -> Sequence[Segment]:
        pictures = [tuple(image_segment(r, i, self._transforms[r], len(seen)) for r in roles) for i in seen]
        return prompt_segments(text, self.tokenizer, pictures)

    def _read(self, prompts: Sequence[Sequence[Segment]]) -> Context:
        """Every prompt's segments, one round after the other; what has come to its end sits out."""
        context = self.decoder.start(len(prompts))
        for i in range(max(map(len, prompts), default=0)):
            self.decoder.prefill(
                context, [p[i] if i < len(p) else Segment(kind="text", dropped=True) for p in prompts]
            )
        return context


def _without_last_text(prompt: Sequence[Segment]) -> Sequence[Segment]:
    texts = [i for i, s in enumerate(prompt) if s.kind == "text"]
    return [s for i, s in enumerate(prompt) if i != texts[-1]] if texts else prompt


def _answer(text: str, heads: list[tuple[str, HeadOutput]], seen: Sequence[Image.Image]) -> Answer:
    boxes, masks = [], []
    for head, output in heads:
        width, height = seen[-1].size
        if head == "box":
            x0, y0, x1, y1 = output.boxes[0].tolist()
            boxes.append((x0 * width, y0 * height, x1 * width, y1 * height))
        if head == "mask":
            masks.append(_mask(output, width, height))
    return Answer(text=text, boxes=boxes, masks=masks)


def _mask(output: HeadOutput, width: int, height: int) -> NDArray[np.bool_]:
    """Logits at the transformed size -> mask at the original size; one bilinear step, as nothing was padded or cropped."""
    logits = output.mask_logits.reshape(1, 1, *output.mask_hw[0])
    if tuple(logits.shape[2:]) != (height, width):
        logits = F.interpolate(logits, size=(height, width), mode="bilinear")
    return (logits[0, 0] > 0).cpu().numpy()


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    try:
        with Image.open(picture) as image:
            return to_rgb(image).copy()  # read now: the file closes here
    except OSError as e:
        raise ValueError(f"{picture}: cannot be read as a picture ({e})") from e


def _to_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def _read_transforms(file: Path) -> dict[str, ImageTransform]:
    values: dict[str, Any] = PUBLISHED_TRANSFORMS
    if file.is_file():
        try:
            values = json.loads(file.read_text())
            return {name: ImageTransform(**values[name]) for name in ("vit", "vae")}
        except (json.JSONDecodeError, TypeError, KeyError, ValueError) as e:
            raise ValueError(
                f"{file}: expected vit and vae with max_image_size, min_image_size, stride ({e!r})"
            ) from e
    return {name: ImageTransform(**values[name]) for name in ("vit", "vae")}
