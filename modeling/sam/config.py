"""Sizes of SAM's parts, with the keys of a Hugging Face `config.json` (`SamConfig`); what it leaves out is SAM-B's."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, TypeVar

C = TypeVar("C", "SamVisionConfig", "SamDecoderConfig")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamVisionConfig:
    """The image encoder.

    Attributes:
        hidden_size, num_hidden_layers, num_attention_heads: of the transformer.
        mlp_dim: inner width of its MLPs; None: `mlp_ratio` times its width.
        output_channels: of the neck.
        image_size: side of the square picture, `patch_size` of a cell of it, in pixels.
        window_size: cells per side that see each other, in layers other than `global_attn_indexes`; 0: all.
    """

    hidden_size: int = 768
    output_channels: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True
    mlp_ratio: float = 4.0
    mlp_dim: int | None = None
    window_size: int = 14
    global_attn_indexes: tuple[int, ...] = (2, 5, 8, 11)

    @property
    def intermediate_size(self) -> int:
        return int(self.hidden_size * self.mlp_ratio) if self.mlp_dim is None else self.mlp_dim

    @property
    def positions_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def rope(self) -> bool:
        """Whether it has rotary positions."""
        return False

    @property
    def stem_width(self) -> int:
        """Channels of a convolutional stem, of which it has none."""
        return 0

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str, *, strict: bool = False) -> "SamVisionConfig":
        """The encoder that a `vision_config` describes; see `_read`."""
        found = _read(SamVisionConfig, values, where, strict)
        if found.hidden_size % found.num_attention_heads:
            raise ValueError(
                f"{where}: num_attention_heads {found.num_attention_heads} does not divide hidden_size {found.hidden_size}"
            )
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class SamDecoderConfig:
    """The mask decoder.

    Attributes:
        hidden_size: of tokens and grid; divisible by 8.
        num_hidden_layers, num_attention_heads, mlp_dim: of the two-way transformer.
        attention_downsample_rate: what the width is divided by where tokens and grid see each other.
        num_multimask_outputs: masks beside the first, for prompts with several meanings.
        iou_head_depth, iou_head_hidden_dim: of the MLP that says how good each mask is.
        layer_norm_eps: of the transformer's layers. Hugging Face has 1e-6, SAM itself and LISA 1e-5.
        iou_sigmoid, object_score: what SAM 2 has besides: the quality in [0, 1], and whether the thing is there at all.
    """

    hidden_size: int = 256
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    mlp_dim: int = 2048
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    layer_norm_eps: float = 1e-6
    iou_sigmoid: bool = False
    object_score: bool = False

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str, *, strict: bool = False) -> "SamDecoderConfig":
        """The decoder that a `mask_decoder_config` describes; see `_read`."""
        found = _read(SamDecoderConfig, values, where, strict)
        inner = found.hidden_size // found.attention_downsample_rate
        if found.hidden_size % 8 or inner % found.num_attention_heads:
            raise ValueError(
                f"{where}: hidden_size {found.hidden_size} must be a multiple of 8, and num_attention_heads "
                f"{found.num_attention_heads} divide its {found.attention_downsample_rate}th part"
            )
        return found


def _read(kind: type[C], values: Mapping[str, Any], where: str, strict: bool) -> C:
    """Keep the keys that shape the network.

    Args:
        kind: of the config.
        values: the JSON object.
        where: names it in messages.
        strict: a key that does not shape it is an error (a person wrote it), not another program's.

    Raises:
        ValueError: naming the key that is unknown, or what goes with other keys only.
    """
    known = [f.name for f in fields(kind)]
    for key in values:
        if strict and key not in known:
            near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
    usual = {"use_rel_pos": True, "use_abs_pos": True}
    for key, value in usual.items():
        if values.get(key, value) != value:
            raise ValueError(f"{where}: {key} is {values[key]!r}; the SAM here has {value!r} only")
    kept: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known
    }
    return kind(**kept)
