"""Models and packs by their sizes alone: random values, tokens and pictures. For benchmarks; nothing learns from it."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from data.packing import pack
from data.tokens import SpecialTokens
from data.types import LaneCursor, PackedBatch, Sample, Segment
from modeling.autoencoder import AutoEncoderConfig
from modeling.bagel.config import BagelConfig
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig

SPECIAL = SpecialTokens(begin=0, end=1, image_start=2, image_end=3, anchors={})
WORDS = 32
"""Tokens of the text that stands with a picture."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model by its sizes."""

    bagel: BagelConfig
    autoencoder: AutoEncoderConfig = AutoEncoderConfig()


SHAPES = {
    "7b": Shape(
        bagel=BagelConfig(
            llm=Qwen2Config(
                hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
                num_key_value_heads=4, vocab_size=152064,
            ),
            vit=SiglipConfig(
                hidden_size=1152, intermediate_size=4304, num_hidden_layers=26, num_attention_heads=16, patch_size=14,
                image_size=980,
            ),
        )
    ),
    "small": Shape(
        bagel=BagelConfig(
            llm=Qwen2Config(
                hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
                num_key_value_heads=2, vocab_size=4096,
            ),
            vit=SiglipConfig(
                hidden_size=192, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4, patch_size=14,
                image_size=980,
            ),
        ),
        autoencoder=AutoEncoderConfig(ch=32),
    ),
}  # fmt: skip
"""`7b`: the published sizes. `small`: something that steps on a CPU."""


def changed(shape: Shape, changes: Sequence[str]) -> Shape:
    """A shape with other sizes.

    Args:
        shape: to start from.
        changes: `PART.FIELD=VALUE` each; the parts are `llm`, `vit`, `bagel` and `ae`.

    Raises:
        ValueError: naming a change that says nothing, or sizes that do not go together.
    """
    parts: dict[str, dict[str, Any]] = {"llm": {}, "vit": {}, "bagel": {}, "ae": {}}
    for change in changes:
        found = re.fullmatch(r"(llm|vit|bagel|ae)\.(\w+)=(.+)", change)
        if found is None:
            raise ValueError(
                f"--set {change}: expected PART.FIELD=VALUE with PART one of llm, vit, bagel, ae, such as llm.hidden_size=512"
            )
        part, name, value = found.groups()
        parts[part][name] = _value(value)
    bagel, ae = shape.bagel, shape.autoencoder
    try:
        ae = replace(ae, **parts["ae"])
        bagel = replace(
            bagel,
            llm=replace(bagel.llm, **parts["llm"]),
            vit=replace(bagel.vit, **parts["vit"]),
            **{"latent_channels": ae.z_channels, "vae_downsample": ae.downsample, **parts["bagel"]},
        )
    except TypeError as error:
        raise ValueError(f"--set: {error}") from error
    return Shape(bagel=bagel, autoencoder=ae)


def _value(text: str) -> Any:
    if re.fullmatch(r"-?\d+", text):
        return int(text)
    if "," in text:
        return tuple(_value(part) for part in text.split(","))
    return {"true": True, "false": False}.get(text.lower(), text)


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchShape:
    """A pack by its sizes.

    Attributes:
        texts: (how many, tokens); the second half of each is learnt.
        see: (how many, height, width) of pictures that are asked about, with a question and an answer.
        draw: likewise, of pictures that are drawn after a caption.
    """

    texts: tuple[tuple[int, int], ...] = ()
    see: tuple[tuple[int, int, int], ...] = ()
    draw: tuple[tuple[int, int, int], ...] = ()

    @staticmethod
    def parse(texts: Sequence[str], see: Sequence[str], draw: Sequence[str]) -> "BatchShape":
        """Of words such as `8x120` and `4x224x224`.

        Raises:
            ValueError: naming the flag and the word that is no such shape.
        """

        def numbers(flag: str, word: str, count: int) -> tuple[int, ...]:
            found = word.split("x")
            if len(found) != count or not all(n.isdecimal() and int(n) for n in found):
                example = (
                    "8x120 (8 texts of 120 tokens)"
                    if count == 2
                    else "4x224x256 (4 pictures, 224 high, 256 wide)"
                )
                raise ValueError(f"--{flag} {word}: expected {example}")
            return tuple(map(int, found))

        return BatchShape(
            texts=tuple(numbers("texts", w, 2) for w in texts),  # type: ignore[misc]
            see=tuple(numbers("see", w, 3) for w in see),  # type: ignore[misc]
            draw=tuple(numbers("draw", w, 3) for w in draw),  # type: ignore[misc]
        )


def synthetic_pack(config: BagelConfig, shape: BatchShape, seed: int) -> PackedBatch:
    """A pack of a shape, with random contents.

    Raises:
        ValueError: if a picture does not suit the model.
    """
    generator = torch.Generator().manual_seed(seed)

    def words(count: int, *, supervised: bool = False) -> Segment:
        ids = torch.randint(4, config.llm.vocab_size, (count,), generator=generator)  # no special ones
        return Segment(kind="text", ids=ids, supervised=supervised)

    def pixels(height: int, width: int) -> torch.Tensor:
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)

    samples = [
        Sample(segments=(words(length - length // 2), words(length // 2, supervised=True)))
        for count, length in shape.texts
        for _ in range(count)
    ]
    samples += [
        Sample(
            segments=(
                Segment(kind="und_image", pixels=pixels(h, w)),
                words(WORDS),
                words(WORDS, supervised=True),
            )
        )
        for count, h, w in shape.see
        for _ in range(count)
    ]
    samples += [
        Sample(
            segments=(
                words(WORDS),
                Segment(kind="gen_image", pixels=pixels(h, w), timestep=0.5, noise_seed=1000 * seed + i),
            )
        )
        for count, h, w in shape.draw
        for i in range(count)
    ]
    return pack(samples, config.layout, SPECIAL, cursor=LaneCursor(lane=0))
