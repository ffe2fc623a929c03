"""Terms + weights + global counts -> the scalar that is differentiated. Pure; the only place that divides.

A step's gradient is that of  sum over terms of  weight x (sum over all ranks and micro-batches of the term's total) / (the same
sum of its count), whatever way the samples fall into packs, micro-batches and ranks. With `--loss_divisor micro_batch`, as
published, each micro-batch is divided by its own count (over all ranks), and the micro-batches are averaged.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from data.types import PackedBatch
from modeling.losses import LOSSES
from modeling.types import FlowState, LossTerm, ModelOutput

Divisor = Literal["step", "micro_batch"]


@dataclass(frozen=True, slots=True)
class Objective:
    """The run's losses.

    Attributes:
        weights: loss name -> weight; losses of absent heads and of weight 0 are left out by `build`.
    """

    weights: Mapping[str, float]

    @staticmethod
    def build(weights: Mapping[str, float], heads: Mapping[str, object]) -> "Objective":
        """Keep the losses whose head the model has.

        Raises:
            ValueError: if a weight names no loss.
        """
        if unknown := sorted(set(weights) - set(LOSSES)):
            raise ValueError(f"no loss is called '{unknown[0]}'; known are {', '.join(LOSSES)}")
        kept = {n: w for n, w in weights.items() if LOSSES[n].head is None or LOSSES[n].head in heads}
        return Objective(kept)

    def counts(self, batch: PackedBatch) -> Tensor:
        """`k` float64, how many things each loss sums over in this pack; adds up over packs and ranks."""
        return torch.tensor([LOSSES[name].count(batch) for name in self.weights], dtype=torch.float64)

    def terms(self, output: ModelOutput, batch: PackedBatch, flow: FlowState) -> tuple[LossTerm, ...]:
        """Every loss of this pack, summed."""
        totals = [LOSSES[name].total(output, batch, flow) for name in self.weights]
        counts = self.counts(batch)
        return tuple(
            LossTerm(name=n, total=t, count=c)
            for n, t, c in zip(self.weights, totals, counts.unbind(), strict=True)
        )

    def scalar(self, terms: tuple[LossTerm, ...], divisor: Tensor) -> Tensor:
        """What this pack adds to the step's loss.

        Args:
            terms: of this pack.
            divisor: `k`, its row of `divisors`; a term with a divisor of 0 adds nothing.
        """
        parts = [
            self.weights[term.name] * term.total / max(count, 1e-12)
            for term, count in zip(terms, divisor.tolist(), strict=True)
        ]
        return torch.stack([p.float() for p in parts]).sum()


def divisors(counts: Tensor, per: Divisor) -> Tensor:
    """What the sums of every micro-batch are divided by.

    Args:
        counts: `m k`, of the step's micro-batches, each summed over all ranks.
        per: `step`: all by the counts of the whole step; `micro_batch`: each by its own, times their number.

    Returns:
        `m k`.
    """
    return counts.sum(0).expand_as(counts) if per == "step" else counts * len(counts)
