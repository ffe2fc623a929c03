"""Qwen2 as the trunk of the packed model: rows in, rows out. Parameter names as in the published checkpoints."""

from torch import Tensor, nn

from modeling.ops.kernels import TORCH
from modeling.ops.rope import rope_table
from modeling.qwen2.config import Qwen2Config
from modeling.qwen2.layers import Attend, DecoderLayer, RMSNorm
from modeling.qwen2.mot import Routed, Routing, Rows


class Qwen2Model(Routed):
    """Embedding, layers, final norm per expert (`norm`, `norm_moe_gen`): `forward` runs the layers, `finish` is the norm."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.add("norm", lambda: RMSNorm(config.hidden_size, config.rms_norm_eps), split=bool(config.experts))

    def forward(self, rows: Rows, routing: Routing, position: Tensor, attend: Attend) -> Rows:
        """Run the decoder's layers.

        Args:
            rows: the embedded tokens by expert, `u d` and `l d`.
            routing: their places in the pack.
            position: `s`, rotary positions in packed order.
            attend: how tokens see each other.

        Returns:
            rows before the final norm.
        """
        cos, sin = rope_table(position, self.config.head_dim, self.config.rope_theta)
        if self.config.freeze_und:
            rows = Rows(rows.und.detach(), rows.gen)
        for layer in self.layers:
            rows = layer(rows, routing, cos, sin, attend)
        return rows

    def finish(self, rows: Rows) -> Rows:
        """The final norm."""
        rows = self.route("norm", rows)
        return Rows(rows.und.detach(), rows.gen) if self.config.freeze_und else rows


class Vocabulary(nn.Linear):
    """The projection on the vocabulary, which also knows its cross entropy: without logits of all tokens at once."""

    kernels = TORCH

    def cross_entropy(self, states: Tensor, labels: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
        """See `modeling.ops.cross_entropy.linear_cross_entropy`. The weights have to be whole: see `ModelOutput.vocabulary`."""
        return self.kernels.cross_entropy(states, self.weight, labels, amount)


class Qwen2ForCausalLM(nn.Module):
    """The decoder and its vocabulary projection."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        self.model = Qwen2Model(config)
        self.lm_head = Vocabulary(config.hidden_size, config.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Make output layer and embeddings one parameter, if they are to be; needed again after `to_empty`, which parts them."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
