"""What an object is called: a small decoder that says it in the language model's words, without running that model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from modeling.heads.attending import QueryLayer, causal, closed, sine_code


class PhraseDecoder(nn.Module):
    """Causal layers over [the object's query, the words so far], which also look at the picture around the object.

    Words come in through the language model's embeddings and go out through its vocabulary: two narrow projections are all that
    is added. The query stands where a text has its beginning, so the first word is said by it alone and no word sees itself.
    """

    def __init__(
        self, *, hidden_size: int, width: int, num_heads: int, num_layers: int, feed_forward: int, near: int
    ):
        super().__init__()
        self.near = near
        self.read, self.write = nn.Linear(hidden_size, width), nn.Linear(width, hidden_size)
        self.layers = nn.ModuleList(QueryLayer(width, num_heads, feed_forward) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, query: Tensor, words: Tensor, around: Tensor, bias: Tensor) -> Tensor:
        """States from which the vocabulary tells each next word.

        Args:
            query: `c d`, of the object.
            words: `c w e`, embeddings of the words so far.
            around: `c k d`, the picture near the object.
            bias: `c k`, 0 or minus a large number, where there is none.

        Returns:
            `c (1 + w) e`: after the query, and after each word.
        """
        x = torch.cat([query[:, None], self.read(words.to(self.read.weight.dtype))], dim=1)
        at = torch.arange(x.shape[1], device=x.device)[None, :, None] / FEW_WORDS
        place = sine_code(at, x.shape[-1]).to(x.dtype)
        for layer in self.layers:
            x = layer(
                x,
                place,
                around,
                torch.zeros_like(around[:1, :1]),
                among=causal(x.shape[1], x.device),
                at=bias[:, None, None],
            )
        states: Tensor = self.write(self.norm(x))
        return states

    def around(self, memory: Tensor, valid: Tensor, centre: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The `k` places of the picture nearest to each object, as parts of its size.

        Args:
            memory, valid, centre: `c n d`, `c n`, `c n 2`, of each object's picture.
            boxes: `c 4` cx cy w h in [0, 1].

        Returns:
            `c k d`, and the bias `c k` of `forward`.
        """
        size = boxes[:, None, 2:].clamp(min=1e-3)
        far = ((centre - boxes[:, None, :2]) / size).square().sum(-1).masked_fill(~valid, float("inf"))
        index = far.topk(min(self.near, far.shape[1]), dim=1, largest=False).indices
        around = memory.gather(1, index[..., None].expand(-1, -1, memory.shape[-1]))
        return around, closed(valid.gather(1, index))

    @torch.no_grad()
    def say(
        self,
        query: Tensor,
        around: Tensor,
        bias: Tensor,
        *,
        embed: Callable[[Tensor], Tensor],
        vocabulary: Callable[[Tensor], Tensor],
        end: int,
        longest: int,
    ) -> tuple[list[list[int]], Tensor]:
        """The likeliest words, one after the other.

        Args:
            query, around, bias: see `forward`.
            embed, vocabulary: of the language model.
            end: id that ends a phrase.
            longest: most words before it.

        Returns:
            ids of each phrase without the end; and how sure each is, `c`: the mean probability of its words, the end among them.
        """
        ids = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
        sure = torch.zeros(len(query), 0, device=query.device)
        open_ = torch.ones(len(query), dtype=torch.bool, device=query.device)
        while open_.any() and ids.shape[1] <= longest:
            states = self(query, embed(ids), around, bias)[:, -1]
            # A word that is left open is closed by its last place: `end` may be late, never missing.
            p, chosen = vocabulary(states).float().softmax(-1).max(-1)
            ids = torch.cat([ids, torch.where(open_, chosen, end)[:, None]], dim=1)
            sure = torch.cat([sure, torch.where(open_, p, 0)[:, None]], dim=1)
            open_ &= chosen != end
        said = [row[: row.index(end)] if end in row else row[:longest] for row in ids.tolist()]
        counts = torch.tensor([max(1, min(len(s) + 1, ids.shape[1])) for s in said], device=query.device)
        return said, sure.sum(1) / counts


FEW_WORDS = 64
"""Places of a phrase that are told apart well."""
