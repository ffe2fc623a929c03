"""Qwen2Config: what a `llm_config.json` says of the decoder."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any

EXPERTS = {
    "Qwen2DecoderLayer": frozenset[str](),
    "Qwen2MoEDecoderLayer": frozenset({"mlp"}),
    "Qwen2MoTDecoderLayer": frozenset({"mlp", "attention", "norm"}),
}
"""`layer_module` -> the parts that generation tokens have their own copy of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Qwen2Config:
    """Sizes of the decoder; names as in `llm_config.json`.

    Raises:
        ValueError: if the sizes do not fit together or `layer_module` is unknown.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False
    qk_norm: bool = True
    freeze_und: bool = False
    layer_module: str = "Qwen2MoTDecoderLayer"

    def __post_init__(self) -> None:
        if self.layer_module not in EXPERTS:
            near = get_close_matches(self.layer_module, EXPERTS, n=1, cutoff=0) or [""]
            raise ValueError(f"layer_module '{self.layer_module}' is unknown; the nearest is '{near[0]}'")
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads} and num_key_value_heads "
                f"{self.num_key_value_heads} must each divide the one before"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def experts(self) -> frozenset[str]:
        """Parts that generation tokens have their own copy of: of `attention`, `mlp`, `norm`."""
        return EXPERTS[self.layer_module]

    @staticmethod
    def from_json(values: Mapping[str, Any]) -> "Qwen2Config":
        """Keep the keys that shape the network; a Hugging Face file has many more."""
        return Qwen2Config(**{f.name: values[f.name] for f in fields(Qwen2Config) if f.name in values})
