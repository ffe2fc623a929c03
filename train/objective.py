"""Terms + weights + global counts -> the scalar that is differentiated. Pure; the only place that divides.

A step's gradient is that of  sum over terms of  weight x (sum over all ranks and micro-batches of the term's total) / (the same
sum of its count), whatever way the samples fall into packs, micro-batches and ranks.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from data.types import PackedBatch
from modeling.losses import LOSSES
from modeling.types import FlowState, LossTerm, ModelOutput


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

    def scalar(self, terms: tuple[LossTerm, ...], global_counts: Tensor) -> Tensor:
        """What this pack adds to the step's loss.

        Args:
            terms: of this pack.
            global_counts: `k`, summed over all packs of the step on all ranks; a term whose count is 0 adds nothing.
        """
        parts = [
            self.weights[term.name] * term.total / max(count, 1e-12)
            for term, count in zip(terms, global_counts.tolist(), strict=True)
        ]
        return torch.stack([p.float() for p in parts]).sum()
