"""Terms + weights + global counts -> the scalar that is differentiated. Pure; the only place that divides.

A step's gradient is that of  sum over terms of  weight x (sum over all ranks and micro-batches of the term's total) / (the same
sum of its count), whatever way the samples fall into packs, micro-batches and ranks. With `--loss_divisor micro_batch`, as
published, each micro-batch is divided by its own count (over all ranks), and the micro-batches are averaged.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from data.types import PackedBatch
from modeling.autoencoder import AutoEncoder
from modeling.heads import head_class
from modeling.losses import LOSSES, Loss
from modeling.losses.pictures import Decode, PictureLoss, dissimilarity, mean_absolute, mean_square
from modeling.types import FlowState, LossTerm, LossValues, ModelOutput
from train.args import LossArgs, PictureLossArgs

Divisor = Literal["step", "micro_batch"]


@dataclass(frozen=True, slots=True)
class Objective:
    """The run's losses.

    Attributes:
        weights: loss name -> weight; losses of absent heads are left out by `build`.
        losses: loss name -> loss, of those and others.
    """

    weights: Mapping[str, float]
    losses: Mapping[str, Loss] = field(default_factory=lambda: LOSSES)

    @staticmethod
    def build(
        weights: Mapping[str, float], heads: Mapping[str, Any], losses: Mapping[str, Loss] = LOSSES
    ) -> "Objective":
        """Keep the losses on what the model's heads (name -> options) give.

        Raises:
            ValueError: if a weight names no loss.
        """
        if unknown := sorted(set(weights) - set(losses)):
            raise ValueError(f"no loss is called '{unknown[0]}'; known are {', '.join(losses)}")
        kept = {n: w for n, w in weights.items() if _is_used(losses[n], w, heads)}
        return Objective(kept, losses)

    def counts(self, batch: PackedBatch) -> Tensor:
        """`k` float64 on the CPU, how much each loss sums over in this pack; adds up over packs and ranks."""
        amounts = [self.losses[name].things(batch).amount.double().sum() for name in self.weights]
        return torch.stack(amounts).cpu()

    def terms(self, output: ModelOutput, batch: PackedBatch, flow: FlowState) -> tuple[LossTerm, ...]:
        """Every loss of this pack, summed."""
        chosen = {name: self.losses[name] for name in self.weights}
        values: dict[str, LossValues] = {}
        for name, loss in chosen.items():
            learns = bool(self.weights[name]) or not loss.watched
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                values[name] = loss.values(output, batch, flow)
        return tuple(
            LossTerm(name=name, total=values[name].total, each=values[name].each, things=loss.things(batch))
            for name, loss in chosen.items()
        )

    def means(self, totals: Tensor, counts: Sequence[float]) -> dict[str, float]:
        """Loss name -> mean; 0 where there was none."""
        rows = zip(self.weights, totals.tolist(), counts, strict=True)
        return {name: self._divided(name, total, count) for name, total, count in rows}

    def _divided(self, name: str, value: float, count: float) -> float:
        divisor = max(count, self.losses[name].least)
        return value / divisor if divisor else 0.0

    def scalar(self, terms: tuple[LossTerm, ...], divisor: Tensor) -> Tensor:
        """What this pack adds to the step's loss.

        Args:
            terms: of this pack.
            divisor: `k`, its row of `divisors`; a term with a divisor of 0 adds nothing.
        """
        # With fp16 the scaled factor goes back through the model: a stand-in for 0 would make it infinite.
        parts = [
            term.total * self._divided(term.name, self.weights[term.name], count)
            for term, count in zip(terms, divisor.tolist(), strict=True)
        ]
        return torch.stack([p.float() for p in parts]).sum()


def _is_used(loss: Loss, weight: float, heads: Mapping[str, Any]) -> bool:
    if loss.optional and weight == 0:
        return False
    if loss.head is None or loss.head not in heads:
        return loss.head is None
    return loss.field is None or loss.field in head_class(loss.head, heads[loss.head]).gives


def build_objective(
    args: LossArgs,
    pictures: PictureLossArgs,
    heads: Mapping[str, Any],
    vae: AutoEncoder,
    latent_patch_size: int,
) -> Objective:
    """The losses that the flags ask for."""
    losses = {**LOSSES, **picture_losses(pictures, vae.decode, latent_patch_size)}
    return Objective.build({**args.weights(), **pictures.weights()}, heads, losses)


def picture_losses(args: PictureLossArgs, decode: Decode, latent_patch_size: int) -> dict[str, Loss]:
    """The losses on decoded pictures, as the flags describe them."""
    pixel = PictureLoss(
        decode=decode,
        patch=latent_patch_size,
        compare=mean_absolute if args.pixel_loss_type == "l1" else mean_square,
        by_pixel=True,
        max_t=args.pixel_loss_max_t,
        paired_only=args.pixel_loss_paired_only,
        chunk=args.chunk,
    )
    ssim = replace(
        pixel,
        compare=dissimilarity(args.ssim_window_size),
        by_pixel=False,
        max_t=args.ssim_loss_max_t,
        gradient_scale=args.ssim_grad_scale,
    )
    return {"pixel": Loss(pixel.values, pixel.things), "ssim": Loss(ssim.values, ssim.things)}


def by_sample(terms: Sequence[LossTerm], batch: PackedBatch) -> Tensor:
    """What every sample of a pack adds to every loss and to its count: `2 k s` float64 on the CPU, totals before amounts."""
    device, samples = batch.position.device, len(batch.sample_lens)
    ends = torch.tensor(batch.sample_lens, dtype=torch.int64, device=device).cumsum(0)
    rows = [torch.zeros(samples, dtype=torch.float64, device=device)]
    for values in (lambda t: t.each, lambda t: t.things.amount):
        for term in terms:
            sample = torch.searchsorted(ends, term.things.place, right=True)
            rows.append(torch.zeros_like(rows[0]).index_add_(0, sample, values(term).double()))
    return torch.stack(rows).cpu()[1:].view(2, len(terms), samples)


def divisors(counts: Tensor, per: Divisor) -> Tensor:
    """What the sums of every micro-batch are divided by.

    Args:
        counts: `m k`, of the step's micro-batches, each summed over all ranks.
        per: `step`: all by the counts of the whole step; `micro_batch`: each by its own, times their number.

    Returns:
        `m k`.
    """
    return counts.sum(0).expand_as(counts) if per == "step" else counts * len(counts)
