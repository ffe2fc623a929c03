"""Attention over a packed sequence, without an N x N mask.

Rule: a token sees tokens of its own sample only. `causal` splits see all before them and themselves causally; `full` and
`noise` splits see all before them and all of themselves; nobody outside a `noise` split sees it. Splits of a branch are seen by
that branch only; the trunk (branch 0) is seen by all that follow.

`AttentionPlan` states the rule for one pack and is built once per forward; `packed_attention` applies it in every layer.
Short samples are padded to a common length and attend in one batched call; long ones go split by split, so that cost
grows with the sum over splits of (split x its context), never with (packed length)^2. Other ways to compute the same stand in
`modeling/ops/attention_backends.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BATCHED_UP_TO = 768
"""Longest sample whose own square mask is cheaper than a call per split."""


class _Part(NamedTuple):
    """One split of a sample."""

    length: int
    mode: str
    branch: int


@dataclass(frozen=True, slots=True)
class _Bucket:
    """Samples attending in one padded call. `index`: `b n`, places in the pack (0 where padded); `allowed`: `b 1 n n`."""

    index: Tensor
    rows: Tensor
    allowed: Tensor | None


@dataclass(frozen=True, slots=True)
class _Split:
    """One split of a long sample: its queries, and the places of what they all see before it."""

    start: int
    stop: int
    context: Tensor
    causal: bool


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """The visibility rule of one pack."""

    buckets: tuple[_Bucket, ...]
    splits: tuple[_Split, ...]
    scatter: Tensor
    num_tokens: int

    @staticmethod
    def build(
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        split_modes: Sequence[str],
        split_branches: Sequence[int],
        device: torch.device,
        batched_up_to: int = BATCHED_UP_TO,
    ) -> "AttentionPlan":
        """Plan for samples laid end to end.

        Args:
            sample_lens: tokens of each sample.
            split_lens, split_modes, split_branches: the splits of all samples, in order.
            device: where the index tensors go.
            batched_up_to: samples longer than this go split by split.

        Raises:
            ValueError: if the splits do not add up to the samples.
        """
        if sum(sample_lens) != sum(split_lens):
            raise ValueError(f"splits cover {sum(split_lens)} tokens, samples {sum(sample_lens)}")
        splits = iter(map(_Part, split_lens, split_modes, split_branches))
        short: dict[int, list[tuple[int, list[_Part]]]] = {}
        long: list[_Split] = []
        start = 0
        for length in sample_lens:
            parts: list[_Part] = []
            while sum(p.length for p in parts) < length:
                parts.append(next(splits))
            if length and length <= batched_up_to:
                # Lengths within an eighth of each other share a bucket.
                step = max(16, 1 << max(0, length.bit_length() - 3))
                short.setdefault(-(-length // step) * step, []).append((start, parts))
            elif length:
                long += _long_sample(start, parts, device)
            start += length
        buckets = tuple(_bucket(samples, length, device) for length, samples in sorted(short.items()))
        order = [b.index.flatten()[b.rows] for b in buckets]
        order += [torch.arange(s.start, s.stop, device=device) for s in long]
        scatter = torch.empty(start, dtype=torch.int64, device=device)
        if order:
            scatter[torch.cat(order)] = torch.arange(start, device=device)
        return AttentionPlan(buckets, tuple(long), scatter, start)


def _bucket(samples: list[tuple[int, list[_Part]]], n: int, device: torch.device) -> _Bucket:
    lengths = torch.tensor([sum(p.length for p in parts) for _, parts in samples])
    starts = torch.tensor([s for s, _ in samples])
    b = len(samples)
    place = torch.arange(n)
    valid = place[None] < lengths[:, None]
    if all(len(parts) == 1 and parts[0].mode != "causal" for _, parts in samples) and bool(valid.all()):
        allowed = None  # pictures of one size: everything sees everything
    else:
        # Of every token: number of its split, its branch, whether it attends as a block, whether other splits may see it.
        facts = torch.tensor(
            [
                (j, p.branch, p.mode != "causal", p.mode == "noise")
                for _, parts in samples
                for j, p in enumerate(parts)
            ]
        ).repeat_interleave(torch.tensor([p.length for _, parts in samples for p in parts]), dim=0)
        padded = torch.zeros(b, n, 4, dtype=torch.int64)
        padded[valid] = facts
        split, branch, block, hidden = padded.unbind(-1)
        block, hidden = block.bool(), hidden.bool()
        before = (place[:, None] >= place[None, :]) & ~hidden[:, None, :]
        before &= (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
        together = (split[:, :, None] == split[:, None, :]) & block[:, :, None] & valid[:, :, None]
        # Padded rows see themselves, so that no row is empty.
        allowed = ((before | together) & valid[:, None, :] | torch.eye(n, dtype=torch.bool))[:, None].to(
            device
        )
    index = torch.where(valid, starts[:, None] + place[None], 0)
    rows = torch.nonzero(valid.flatten()).flatten()
    return _Bucket(index.to(device), rows.to(device), allowed)


def _long_sample(start: int, parts: list[_Part], device: torch.device) -> list[_Split]:
    splits: list[_Split] = []
    seen: list[tuple[int, Tensor]] = []
    at = start
    for part in parts:
        visible = [tokens for branch, tokens in seen if branch in (0, part.branch)]
        context = torch.cat(visible) if visible else torch.zeros(0, dtype=torch.int64)
        splits.append(_Split(at, at + part.length, context.to(device), part.mode == "causal"))
        if part.mode != "noise":
            seen.append((part.branch, torch.arange(at, at + part.length)))
        at += part.length
    return splits


def packed_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Scaled dot-product attention under the plan's rule.

    Args:
        q: `s h e`; k, v: `s g e` with `h` a multiple of `g` (grouped queries).
        plan: of this pack.

    Returns:
        `s h e`.
    """
    if not plan.num_tokens:
        # Nothing to attend to, but q, k and v must stay in the graph: their weights get a zero gradient on every rank.
        return q + 0 * (k.sum() + v.sum())
    grouped = q.shape[1] != k.shape[1]
    parts = []
    for bucket in plan.buckets:
        b, n = bucket.index.shape
        flat = bucket.index.flatten()
        qb, kb, vb = (x.index_select(0, flat).view(b, n, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        out = masked_attention(qb, kb, vb, bucket.allowed)
        parts.append(out.transpose(1, 2).reshape(b * n, *q.shape[1:]).index_select(0, bucket.rows))
    for split in plan.splits:
        parts.append(_attend_split(q, k, v, split, grouped))
    return torch.cat(parts).index_select(0, plan.scatter)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None) -> Tensor:
    """Attention of batched sequences.

    Args:
        q: `b h n e`; k, v: `b g m e` with `h` a multiple of `g`.
        allowed: `b 1 n m` bool, at least one key per query; None: all.

    Returns:
        `b h n e`.
    """
    if q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=q.shape[1] != k.shape[1])
    # On a CPU the fused kernel is made for long sequences; at these lengths three plain operations are several times faster.
    q = (q * q.shape[-1] ** -0.5).unflatten(1, (k.shape[1], -1))
    scores = q @ k[:, :, None].transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill_(~allowed[:, None], float("-inf"))
    return (scores.softmax(-1) @ v[:, :, None]).flatten(1, 2)


def _attend_split(q: Tensor, k: Tensor, v: Tensor, split: _Split, grouped: bool) -> Tensor:
    own = slice(split.start, split.stop)
    past, length = len(split.context), split.stop - split.start
    ks, vs = (torch.cat([x.index_select(0, split.context), x[own]]) if past else x[own] for x in (k, v))
    mask = None
    if split.causal and past:
        # Lower right aligned: the context is fully visible, the split itself causally.
        mask = torch.ones(length, past + length, dtype=torch.bool, device=q.device).tril(past)
    out = F.scaled_dot_product_attention(
        q[own].transpose(0, 1)[None],
        ks.transpose(0, 1)[None],
        vs.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=split.causal and not past,
        enable_gqa=grouped,
    )
    return out[0].transpose(0, 1)


@dataclass(frozen=True, slots=True)
class Visibility:
    """The rule written out, token by token: what it needs to know of every token, all `s`."""

    sample: Tensor
    split: Tensor
    branch: Tensor
    block: Tensor
    noise: Tensor

    @staticmethod
    def build(
        sample_lens: Sequence[int],
        split_lens: Sequence[int],
        split_modes: Sequence[str],
        split_branches: Sequence[int],
        device: torch.device | None = None,
    ) -> "Visibility":
        """Of samples laid end to end, with the splits of all of them in order."""

        def of_token(values: Sequence[int], lens: Sequence[int]) -> Tensor:
            each, counts = (torch.tensor(x, dtype=torch.int64) for x in (values, lens))
            return torch.repeat_interleave(each, counts).to(device)

        return Visibility(
            sample=of_token(range(len(sample_lens)), sample_lens),
            split=of_token(range(len(split_lens)), split_lens),
            branch=of_token(split_branches, split_lens),
            block=of_token([m != "causal" for m in split_modes], split_lens).bool(),
            noise=of_token([m == "noise" for m in split_modes], split_lens).bool(),
        )

    def allowed(self, query: Tensor, key: Tensor) -> Tensor:
        """Whether the tokens at `query` see those at `key`, places in the pack of any shapes that go together."""
        same_split = self.split[query] == self.split[key]
        visible = (query >= key) | (same_split & self.block[query])
        visible = visible & ((self.branch[key] == 0) | (self.branch[key] == self.branch[query]))
        return visible & (self.sample[query] == self.sample[key]) & (same_split | ~self.noise[key])


def dense_allowed(
    sample_lens: Sequence[int],
    split_lens: Sequence[int],
    split_modes: Sequence[str],
    split_branches: Sequence[int],
) -> Tensor:
    """`s s` bool, who sees whom: for tests and pictures, never for training."""
    place = torch.arange(sum(sample_lens))
    rule = Visibility.build(sample_lens, split_lens, split_modes, split_branches)
    return rule.allowed(place[:, None], place[None])
