"""Which prediction stands for which true object: the cheapest assignment of a set to a set (DETR, arXiv 2005.12872)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from modeling.ops.boxes import centre_to_corners, paired_giou
from modeling.optional import require

ALPHA, GAMMA = 0.25, 2.0
"""Of the focal loss (arXiv 1708.02002), as every detector with sigmoid scores since Deformable DETR has them."""

OUT_OF_REACH = 1e6
"""Cost of a pair that must not be; it stands for what is not finite too, on which the assignment would fail."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MatchCost:
    """Weights of what a match costs."""

    score: float = 2.0
    l1: float = 5.0
    giou: float = 2.0


def focal(logits: Tensor, truth: Tensor) -> Tensor:
    """Focal loss of independent yes-or-no logits, of each one.

    Args:
        logits, truth: `...`; truth is 0 or 1.
    """
    p = logits.sigmoid()
    wrong = p + truth - 2 * p * truth
    weight = ALPHA * truth + (1 - ALPHA) * (1 - truth)
    return weight * wrong**GAMMA * F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def score_costs(logits: Tensor, *, with_none: bool) -> Tensor:
    """What it costs to call a prediction each of the classes.

    Args:
        logits: `... c`.
        with_none: the last of them means "no object", and all compete (softmax); else each is for itself (sigmoid).

    Returns:
        `... c` without the "no object": minus the probability, or what the focal loss gains.
    """
    if with_none:
        return -logits.softmax(-1)[..., :-1]
    yes = ALPHA * (1 - logits.sigmoid()) ** GAMMA * -F.logsigmoid(logits)
    no = (1 - ALPHA) * logits.sigmoid() ** GAMMA * -F.logsigmoid(-logits)
    return yes - no


@torch.no_grad()
def match_costs(
    logits: Tensor, boxes: Tensor, classes: Tensor, truth: Tensor, *, with_none: bool, cost: MatchCost
) -> Tensor:
    """Cost of every prediction for every true object of its picture, float32.

    Args:
        logits: `r q c`, see `score_costs`.
        boxes: `r q 4` cx cy w h in [0, 1].
        classes: `r t` int64, of the true objects.
        truth: `r t 4` cx cy w h, of the true objects.
        with_none: see `score_costs`.
        cost: weights.

    Returns:
        `r q t`.
    """
    boxes, truth = boxes.float(), truth.float()
    named = score_costs(logits.float(), with_none=with_none)
    called = named.gather(2, classes[:, None].expand(-1, named.shape[1], -1))
    distance = (boxes[:, :, None] - truth[:, None]).abs().sum(-1)
    giou = paired_giou(centre_to_corners(boxes)[:, :, None], centre_to_corners(truth)[:, None])[1]
    return cost.score * called + cost.l1 * distance - cost.giou * giou


@torch.no_grad()
def assign(costs: Sequence[Tensor], num_true: Sequence[int]) -> list[Tensor]:
    """The cheapest one-to-one assignment of each picture, for several sets of predictions; one transfer for all of them.

    Args:
        costs: per set `r q t`, pictures with fewer true objects than `t` filled up behind.
        num_true: true objects of each picture.

    Returns:
        per set `b` int64: for every true object, picture after picture, `picture x q + prediction`; -1 where the picture has
        fewer predictions within reach than true objects.
    """
    device = costs[0].device
    optimise = require(
        "scipy.optimize", package="scipy", extra="detection", why="the matching of boxes (head `detr`)"
    )
    everything = torch.cat([c.flatten() for c in costs]).nan_to_num(OUT_OF_REACH, OUT_OF_REACH, OUT_OF_REACH)
    sizes = [c.numel() for c in costs]
    found = []
    for part, shape in zip(everything.cpu().split(sizes), [c.shape for c in costs], strict=True):
        table, queries = part.view(shape).clamp(max=OUT_OF_REACH).numpy(), shape[1]
        rows: list[int] = []
        for picture, count in enumerate(num_true):
            chosen = [-1] * count
            pairs = zip(*optimise.linear_sum_assignment(table[picture, :, :count]), strict=True)
            for query, thing in pairs:
                if table[picture, query, thing] < OUT_OF_REACH:
                    chosen[thing] = picture * queries + int(query)
            rows += chosen
        found.append(torch.tensor(rows, dtype=torch.int64, device=device))
    return found
