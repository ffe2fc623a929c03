"""Expert routing: every token goes through the `und` or the `gen` copy of a module.

The two kinds of tokens are kept apart from embedding to final norm, so routing costs no gather; they meet, in packed
order, only inside attention. On a CPU each kind is filled up to a multiple of `BLOCK` rows that nobody reads: its matrix kernels
are compiled per shape, and no two packs have the same number of tokens of a kind (benchmarks/cpu_step.py).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BLOCK = 128
GEN = "_moe_gen"
"""Suffix of the generation copy of a module, as in the published checkpoints."""


class Rows(NamedTuple):
    """The pack's tokens by expert: `und` `u d` (text, markers, ViT patches), `gen` `l d` (latent patches); see `filled`."""

    und: Tensor
    gen: Tensor

    def __add__(self, other: "Rows") -> "Rows":  # type: ignore[override]
        return Rows(self.und + other.und, self.gen + other.gen)


@dataclass(frozen=True, slots=True)
class Routing:
    """Places of each expert's tokens in the packed sequence: `und` `u` and `gen` `l`, filled up; `merge` `s`: order of
    `cat(und, gen)`.
    """

    und: Tensor
    gen: Tensor
    merge: Tensor

    @staticmethod
    def build(gen_index: Tensor, num_tokens: int) -> "Routing":
        """Everything that is not a latent patch goes to the `und` expert."""
        is_und = torch.ones(num_tokens, dtype=torch.bool, device=gen_index.device)
        is_und[gen_index] = False
        und = is_und.nonzero().flatten()
        und_filled, gen_filled = filled(und), filled(gen_index)
        merge = torch.empty(num_tokens, dtype=torch.int64, device=und.device)
        merge[und] = torch.arange(len(und), device=und.device)
        merge[gen_index] = torch.arange(len(gen_index), device=und.device) + len(und_filled)
        return Routing(und_filled, gen_filled, merge)

    def pack(self, rows: Rows) -> Tensor:
        """Rows by expert -> packed order, `s …`."""
        return torch.cat([rows.und, rows.gen]).index_select(0, self.merge)

    def split(self, packed: Tensor) -> Rows:
        """Packed order -> rows by expert."""
        return Rows(packed.index_select(0, self.und), packed.index_select(0, self.gen))


def filled(rows: Tensor) -> Tensor:
    """Append zero rows up to a multiple of `BLOCK`, on a CPU and from one block on (few rows are cheap as they are)."""
    if rows.device.type != "cpu" or len(rows) < BLOCK or len(rows) % BLOCK == 0:
        return rows
    return F.pad(rows, [0, 0] * (rows.ndim - 1) + [0, -len(rows) % BLOCK])


class Routed(nn.Module):
    """Base of modules with parts that exist once or once per expert."""

    def add(self, name: str, make, *, split: bool) -> None:
        """Register `make()` under `name`, and a second copy for generation tokens if `split`."""
        self.add_module(name, make())
        if split:
            self.add_module(name + GEN, make())

    def route(self, name: str, rows: Rows) -> Rows:
        """Send each expert's rows through its copy of `name`."""
        und = getattr(self, name)
        gen = self._modules.get(name + GEN, und)
        return Rows(und(rows.und), gen(rows.gen))
