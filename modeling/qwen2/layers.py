"""The decoder's parts: RMSNorm, gated MLP, attention, layer."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling.ops.kernels import TORCH
from modeling.qwen2.config import Qwen2Config
from modeling.qwen2.mot import Routed, Routing, Rows

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q `s h e`, k `s g e`, v `s g e`) -> `s h e`: packed attention in training, cached attention at inference."""


class RMSNorm(nn.Module):
    """x / rms(x), computed in float32, then times a weight."""

    kernels = TORCH

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return self.kernels.rms_norm(x, self.weight, self.eps)


class MLP(nn.Module):
    """SwiGLU without bias."""

    kernels = TORCH

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.kernels.swiglu(self.gate_proj(x), self.up_proj(x)))


class Attention(Routed):
    """Grouped-query attention over the whole pack; projections and head norms per expert."""

    kernels = TORCH

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_norm = layer, config.head_dim, config.qk_norm
        self.freeze_und = config.freeze_und
        width, kv = config.hidden_size, config.num_key_value_heads * config.head_dim
        split = "attention" in config.experts
        self.add("q_proj", lambda: nn.Linear(width, width), split=split)
        self.add("k_proj", lambda: nn.Linear(width, kv), split=split)
        self.add("v_proj", lambda: nn.Linear(width, kv), split=split)
        self.add("o_proj", lambda: nn.Linear(width, width, bias=False), split=split)
        if config.qk_norm:
            self.add("q_norm", lambda: RMSNorm(config.head_dim, config.rms_norm_eps), split=split)
            self.add("k_norm", lambda: RMSNorm(config.head_dim, config.rms_norm_eps), split=split)

    def _project(self, name: str, norm: str, rows: Rows) -> Rows:
        heads = Rows(*(x.unflatten(-1, (-1, self.head_dim)) for x in self.route(name, rows)))
        heads = self.route(norm, heads) if norm and self.qk_norm else heads
        return Rows(heads.und.detach(), heads.gen) if self.freeze_und else heads

    def project(
        self, rows: Rows, routing: Routing, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows -> q `s h e`, k and v `s g e` in packed order, q and k rotated."""
        q = routing.pack(self._project("q_proj", "q_norm", rows))
        k = routing.pack(self._project("k_proj", "k_norm", rows))
        q, k = self.kernels.rotate(q, k, cos, sin)
        v = routing.pack(self._project("v_proj", "", rows))
        return q, k.to(q.dtype), v

    def combine(self, attended: Tensor, routing: Routing) -> Rows:
        """Attention's result `s h e` -> rows."""
        return self.route("o_proj", routing.split(attended.flatten(1)))


class DecoderLayer(Routed):
    """Pre-norm block: attention, then MLP, each added to the stream.

    What stands before and after attention are methods of their own: tensors in, tensors out, whatever the pack looks like.
    """

    def __init__(self, config: Qwen2Config, layer: int):
        super().__init__()
        self.freeze_und = config.freeze_und
        norm, mlp = "norm" in config.experts, "mlp" in config.experts
        self.self_attn = Attention(config, layer)
        self.add("mlp", lambda: MLP(config), split=mlp)
        self.add("input_layernorm", lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), split=norm)
        self.add(
            "post_attention_layernorm", lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), split=norm
        )

    def forward(self, rows: Rows, routing: Routing, cos: Tensor, sin: Tensor, attend: Attend) -> Rows:
        q, k, v = self.before_attention(rows, routing, cos, sin)
        return self.after_attention(rows, attend(self.self_attn.layer, q, k, v), routing)

    def before_attention(
        self, rows: Rows, routing: Routing, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The stream -> what `attend` takes."""
        return self.self_attn.project(self.route("input_layernorm", rows), routing, cos, sin)

    def after_attention(self, rows: Rows, attended: Tensor, routing: Routing) -> Rows:
        """The stream and what `attend` gave -> the stream after this layer."""
        rows = rows + self._keep(self.self_attn.combine(attended, routing))
        return rows + self._keep(self.route("mlp", self.route("post_attention_layernorm", rows)))

    def _keep(self, rows: Rows) -> Rows:
        """Published meaning of `freeze_und`: understanding rows carry no gradient at all."""
        return Rows(rows.und.detach(), rows.gen) if self.freeze_und else rows
