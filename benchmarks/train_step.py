"""A training step of a small model beside the published way: forward, backward, clipping, AdamW, average.

    python benchmarks/train_step.py [--rounds 7] [--cases short long bf16 growth]

The model is `small` of train/synthetic.py (32 M parameters with its tables), float32 weights, one thread; CPU time, medians over
interleaved rounds. Latents are made before: the VAE is the same in both.

Published (Bagel's model and trainer, restated from the facts that are kept of them; same weights): states stand in packed order,
and every projection and norm gathers each expert's rows and writes them into zeros; attention goes sample by sample under a mask
of float32 that came with the batch, with keys and values repeated for every query head, the picture tower's image by image; all
logits at once; default AdamW, the average in two passes. The masks have four axes, so that torch's fused CPU kernel takes them.
Losses and gradients are compared; `difference` is the largest of them, relative.

| case | pack | goal |
|---|---|---|
| short | about 2,000 tokens in samples of some 120: texts, pictures asked about, pictures drawn | 1.6 |
| long | one sample of about 4,000: text, picture, text, drawn picture | 1.8 |
| bf16 | short, forward and backward in bf16 | 1.5 |
| growth | time of 8k tokens in short samples over that of 1k (per token, times 8) | at most 8.2 |

What the gain is made of (`gain_of`, factors whose product is the ratio): attention without masks, cross entropy by blocks and
the optimizer's tail, each alone put into the published step; the library of matrix products, taken out of ours (which fills rows
up to whole blocks for it; `published, other library` does not, and has less of it); `rest`, mostly routing and fewer copies.
Exits with 1 unless the goals are reached and no batch of ours holds a mask.
"""

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from data.packing import pack
from data.types import LaneCursor, PackedBatch, Sample, Segment
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.latents import LatentEncoder
from modeling.build import build_model, initial_values
from modeling.ops.attention import AttentionPlan, dense_allowed, packed_attention
from modeling.ops.matmul import set_matmul_precision
from modeling.qwen2.layers import DecoderLayer, RMSNorm
from modeling.types import FlowState
from train.adamw import AdamW
from train.args import LossArgs
from train.distributed.sharding import fill, grad_norm
from train.ema import Ema
from train.objective import Objective
from train.optim import clip_factor
from train.synthetic import SHAPES, SPECIAL, BatchShape, synthetic_pack

SHAPE = SHAPES["small"]
NORM, DECAY, LR = 1.0, 0.9999, 1e-4
GOALS = {"short": 1.6, "long": 1.8, "bf16": 1.5}
GROWTH_GOAL = 8.2
CHANGES = ATTENTION, ENTROPY, TAIL = "attention without masks", "cross entropy by blocks", "optimizer's tail"
LIBRARY = "matrix library"
"""Ours with the library that torch takes for float32."""


# ---------------------------------------------------------------------------------------------------------- the published way


class Published(nn.Module):
    """The published forward pass on our model's weights, up to the losses.

    Args:
        model: whose modules are used, one by one.
        plain_attention: as published; else ours.
        all_logits: as published; else cross entropy by blocks.
    """

    def __init__(self, model: Bagel, *, plain_attention: bool = True, all_logits: bool = True):
        super().__init__()
        self.model = model
        self.plain_attention, self.all_logits = plain_attention, all_logits

    def forward(self, batch: PackedBatch, flow: FlowState, masks: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy plus mean squared error of the velocity."""
        model, trunk = self.model, self.model.language_model.model
        gen = batch.gen_index
        und = torch.cat([batch.text_index, batch.und_index])
        embedded = trunk.embed_tokens(batch.text_ids)
        x = embedded.new_zeros(batch.num_tokens, embedded.shape[1])
        x[batch.text_index] = embedded
        x[batch.und_index] = self._see(batch).to(x.dtype)
        drawn = model.vae2llm(flow.noised.to(x.dtype)) + model.time_embedder(batch.gen_timestep)
        x[gen] = (drawn + model.latent_pos_embed(batch.gen_position)).to(x.dtype)
        cos, sin = rotary(batch.position, trunk.config.head_dim, trunk.config.rope_theta)
        layout = (batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
        plan = None if self.plain_attention else AttentionPlan.build(*layout, x.device)
        for layer in trunk.layers:
            x = self._layer(layer, x, und, gen, cos, sin, masks, plan, batch.sample_lens)
        final = torch.zeros_like(x)
        final[und] = rms_norm(trunk.norm, x[und])
        final[gen] = rms_norm(trunk.norm_moe_gen, x[gen])
        states = final[batch.label_index]
        if self.all_logits:
            nll = F.cross_entropy(
                model.language_model.lm_head(states).float(), batch.label_ids, reduction="none"
            )
            ce = nll.mean()
        else:
            amount = torch.ones(len(states))
            ce = model.language_model.lm_head.cross_entropy(states, batch.label_ids, amount)[0] / len(states)
        velocity = model.llm2vae(final[gen]).float()
        learns = batch.gen_timestep > 0
        return ce + (velocity - (flow.noise - flow.latents))[learns].square().mean()

    def _see(self, batch: PackedBatch) -> Tensor:
        model = self.model
        tower = model.vit_model.vision_model
        patches = batch.und_patches.float().div(127.5).sub(1).to(model.connector.fc1.weight.dtype)
        x = tower.embeddings(patches, batch.und_position, ())
        lens = batch.und_hw.prod(1).tolist()
        for layer in tower.encoder.layers:
            q, k, v = layer.before_attention(x, None)
            seen = [sdpa(*one, None) for one in zip(*(y.split(lens) for y in (q, k, v)), strict=True)]
            x = layer.after_attention(x, torch.cat(seen))
        return model.connector(tower.post_layernorm(x)) + model.vit_pos_embed(batch.und_position)

    def _layer(
        self, layer: DecoderLayer, x: Tensor, und: Tensor, gen: Tensor, cos: Tensor, sin: Tensor,
        masks: Sequence[Tensor], plan: AttentionPlan | None, sample_lens: Sequence[int],
    ) -> Tensor:  # fmt: skip
        own = layer.self_attn

        def each(name: str, y: Tensor, apply: Callable[[nn.Module, Tensor], Tensor], *shape: int) -> Tensor:
            module = own if hasattr(own, name) else layer
            out = y.new_zeros(len(y), *shape)
            out[und] = apply(getattr(module, name), y[und])
            out[gen] = apply(getattr(module, name + "_moe_gen"), y[gen])
            return out

        def project(name: str) -> Tensor:
            width = getattr(own, name).out_features
            return each(name, normed, lambda m, y: m(y), width).unflatten(-1, (-1, own.head_dim))

        width = x.shape[1]
        normed = each("input_layernorm", x, rms_norm, width)
        q, k, v = (project(name) for name in ("q_proj", "k_proj", "v_proj"))
        q, k = each("q_norm", q, rms_norm, *q.shape[1:]), each("k_norm", k, rms_norm, *k.shape[1:])
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        if plan is None:
            k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], dim=1) for y in (k, v))
            parts = zip(*(y.split(sample_lens) for y in (q, k, v)), masks, strict=True)
            attended = torch.cat([sdpa(*part) for part in parts])
        else:
            attended = packed_attention(q, k, v, plan)
        x = x + each("o_proj", attended.flatten(1), lambda m, y: m(y), width)
        normed = each("post_attention_layernorm", x, rms_norm, width)
        return x + each("mlp", normed, gated, width)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """One sample, `s h e`."""
    q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
    mask = None if mask is None else mask.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


def rms_norm(norm: RMSNorm, x: Tensor) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + norm.eps)
    return norm.weight * wide.to(x.dtype)


def gated(mlp: Any, x: Tensor) -> Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


def rotary(position: Tensor, width: int, theta: float) -> tuple[Tensor, Tensor]:
    angle = position.float()[:, None] / theta ** (torch.arange(0, width, 2).float() / width)
    angle = torch.cat([angle, angle], -1)[:, None]
    return angle.cos(), angle.sin()


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return x * cos.to(x.dtype) + torch.cat([-b, a], -1) * sin.to(x.dtype)


def dense_masks(batch: PackedBatch) -> list[Tensor]:
    """What the published batch carries: a float32 matrix per sample, 0 and minus infinity, `1 1 s s`."""
    layout = (batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches)
    masks, start, split = [], 0, 0
    for length in batch.sample_lens:
        end, first = start + length, split
        while sum(batch.split_lens[first:split]) < length:
            split += 1
        one = dense_allowed((length,), *(part[first:split] for part in layout[1:]))
        masks.append(torch.zeros(1, 1, length, length).masked_fill_(~one, float("-inf")))
        start = end
    return masks


# ------------------------------------------------------------------------------------------------------------------ the steps


class Ours(nn.Module):
    """Our forward pass, up to the same loss."""

    def __init__(self, model: Bagel):
        super().__init__()
        self.model = model
        self.objective = Objective.build({**LossArgs().weights(), "ce": 1.0, "mse": 1.0}, {})

    def forward(self, batch: PackedBatch, flow: FlowState, masks: Sequence[Tensor]) -> Tensor:
        terms = self.objective.terms(self.model(batch, flow.noised), batch, flow)
        return self.objective.scalar(terms, self.objective.counts(batch))


class Step:
    """Forward, backward and update of one way.

    Args:
        way: `Published` or `Ours`.
        dtype: of forward and backward; weights stay float32.
        published_tail: how clipping, AdamW and the average are done.
        torchs_library: matrices are multiplied by what torch takes for float32; else as `set_matmul_precision` finds best.
    """

    def __init__(
        self, way: nn.Module, dtype: torch.dtype, *, published_tail: bool = True, torchs_library: bool = True
    ):
        self.way, self.dtype, self.published_tail = way, dtype, published_tail
        self.torchs_library = torchs_library
        self.weights = {n: p for n, p in way.named_parameters() if p.requires_grad}
        params = list(self.weights.values())
        self.adamw = AdamW(params, lr=LR, weight_decay=0.0, fused=True)
        self.default = torch.optim.AdamW(params, lr=LR, weight_decay=0.0)
        self.average = Ema(way, DECAY)
        self.averages = list(self.average.averages.values())

    def gradients(self, batch: PackedBatch, flow: FlowState, masks: Sequence[Tensor]) -> float:
        """Loss; the gradients are in the weights."""
        if self.torchs_library:
            torch.set_float32_matmul_precision("highest")
        else:
            torch.set_float32_matmul_precision(best_library())
        weights: Mapping[str, Tensor] = {n: p.to(self.dtype) for n, p in self.way.named_parameters()}
        loss = functional_call(self.way, dict(weights), (batch, flow, masks))
        loss.backward()
        return loss.item()

    def __call__(self, batch: PackedBatch, flow: FlowState, masks: Sequence[Tensor]) -> None:
        self.gradients(batch, flow, masks)
        params = list(self.weights.values())
        if self.published_tail:
            nn.utils.clip_grad_norm_(params, NORM)
            self.default.step()
            with torch.no_grad():
                torch._foreach_mul_(self.averages, DECAY)
                torch._foreach_add_(self.averages, params, alpha=1 - DECAY)
        else:
            self.adamw.step(factor=clip_factor(float(grad_norm(params)), NORM))
            self.average.update(0)
        for p in params:
            p.grad = None


@functools.cache
def best_library() -> str:
    """What the trainer makes of `--matmul_precision highest` on this machine, in torch's words."""
    set_matmul_precision("highest", "cpu")
    return torch.get_float32_matmul_precision()


def build() -> Bagel:
    model = build_model(SHAPE.bagel)
    model.to_empty(device="cpu")
    fill(model, initial_values(model.config, 0))
    torch.manual_seed(0)
    with torch.no_grad():  # the published beginning predicts 0 there, and its gradient stops
        model.llm2vae.weight.normal_(0, 0.02)
    return model


def short_pack(tokens: int) -> PackedBatch:
    """Samples of some 120 tokens: as many texts as pictures asked about as pictures drawn."""
    each = round(tokens / 3 / 120)
    shape = BatchShape(texts=((each, 120),), see=((each, 98, 98),), draw=((each, 128, 128),))
    return synthetic_pack(SHAPE.bagel, shape, seed=0)


def long_pack() -> PackedBatch:
    """One sample: 800 words, a picture of 896 patches, 1,200 words that are learnt, a drawn picture of 1,024."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(4, SHAPE.bagel.llm.vocab_size, (2000,), generator=generator)

    def pixels(height: int, width: int) -> Tensor:
        return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)

    segments = (
        Segment(kind="text", ids=words[:800]),
        Segment(kind="und_image", pixels=pixels(28 * 14, 32 * 14)),
        Segment(kind="text", ids=words[800:], supervised=True),
        Segment(kind="gen_image", pixels=pixels(512, 512), timestep=0.5, noise_seed=1),
    )
    return pack([Sample(segments=segments)], SHAPE.bagel.layout, SPECIAL, cursor=LaneCursor(lane=0))


def latents(batch: PackedBatch, model: Bagel) -> FlowState:
    return LatentEncoder(AutoEncoder(SHAPE.autoencoder).eval(), model.config.latent_patch_size)(batch)


def mask_bytes(tensors: Sequence[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def square_tensors(batch: PackedBatch) -> list[Tensor]:
    """What of a batch would be a mask: anything with two axes of a sample's or the pack's length."""
    lengths = {*batch.sample_lens, batch.num_tokens}
    found: list[Tensor] = []
    batch.map(lambda x: (found.append(x) if sum(n in lengths and n > 8 for n in x.shape) > 1 else None, x)[1])
    return found


# ----------------------------------------------------------------------------------------------------------------- measuring


def growth(rounds: int) -> float:
    """Time of our step on 8,000 tokens over that on 1,000."""
    model = build()
    step = Step(Ours(model), torch.float32, published_tail=False, torchs_library=False)
    packs = [short_pack(tokens) for tokens in (1000, 8000)]
    flows = [latents(pack, model) for pack in packs]
    ratios = []
    for _ in range(1 + rounds):  # kernels are loaded in the first
        seconds = []
        for batch, flow in zip(packs, flows, strict=True):
            begun = time.process_time()
            step(batch, flow, ())
            seconds.append(time.process_time() - begun)
        ratios.append(seconds[1] / seconds[0] * packs[0].num_tokens / packs[1].num_tokens * 8)
    return statistics.median(ratios[1:])


def measure(batch: PackedBatch, rounds: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Times of one pack, their ratios, and how far the results are apart."""
    model = build()
    flow, masks = latents(batch, model), dense_masks(batch)
    ways: dict[str, Step] = {
        "published": Step(Published(model), dtype),
        "ours": Step(Ours(model), dtype, published_tail=False, torchs_library=False),
    }
    ways[LIBRARY] = Step(Ours(model), dtype, published_tail=False)
    ways["published, other library"] = Step(Published(model), dtype, torchs_library=False)
    ways[ATTENTION] = Step(Published(model, plain_attention=False), dtype)
    ways[ENTROPY] = Step(Published(model, all_logits=False), dtype)
    ways[TAIL] = Step(Published(model), dtype, published_tail=False)
    difference = compare(ways, batch, flow, masks)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, step in ways.items():
            begun = time.process_time()
            step(batch, flow, masks)
            seconds[name].append(time.process_time() - begun)

    def gain(slow: str, fast: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True))

    ratio = gain("published", "ours")
    gains = {name: gain("published", name) for name in CHANGES}
    gains[LIBRARY] = gain(LIBRARY, "ours")
    gains["rest"] = ratio / math.prod(gains.values())
    return {
        "tokens": batch.num_tokens,
        "samples": len(batch.sample_lens),
        "cpu_ms": {name: round(1e3 * statistics.median(row), 1) for name, row in seconds.items()},
        "ratio": round(ratio, 2),
        "gain_of": {name: round(value, 2) for name, value in gains.items()},
        "difference": {name: float(f"{value:.2g}") for name, value in difference.items()},
        "mask_bytes": {"published": mask_bytes(masks), "ours": mask_bytes(square_tensors(batch))},
    }


def compare(
    ways: Mapping[str, Step], batch: PackedBatch, flow: FlowState, masks: Sequence[Tensor]
) -> dict[str, float]:
    """Every way's loss and gradients against the published ones; also loads kernels and touches memory."""
    results: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for name, step in ways.items():
        loss = step.gradients(batch, flow, masks)
        grads = {n: p.grad for n, p in step.weights.items() if p.grad is not None}
        results[name] = loss, grads
        for p in step.weights.values():
            p.grad = None
    expected, wanted = results.pop("published")
    scale = max(float(g.abs().max()) for g in wanted.values())
    worst = {}
    for name, (loss, grads) in results.items():
        assert grads.keys() == wanted.keys(), sorted(grads.keys() ^ wanted.keys())[:3]
        gap = max(float((g - wanted[n]).abs().max()) for n, g in grads.items())
        worst[name] = max(abs(loss / expected - 1), gap / scale)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=2000, help="of the short packs")
    parser.add_argument("--cases", nargs="+", choices=(*GOALS, "growth"), default=(*GOALS, "growth"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    cases: dict[str, Callable[[], dict[str, Any]]] = {
        "short": lambda: measure(short_pack(args.tokens), args.rounds),
        "long": lambda: measure(long_pack(), args.rounds),
        "bf16": lambda: measure(short_pack(args.tokens), args.rounds, torch.bfloat16),
    }
    result: dict[str, Any] = {"rounds": args.rounds}
    passed = True
    for name, case in cases.items():
        if name in args.cases:
            result[name] = case()
            passed &= result[name]["ratio"] >= GOALS[name] and not result[name]["mask_bytes"]["ours"]
    if "growth" in args.cases:
        result["growth"] = round(growth(args.rounds), 2)
        passed &= result["growth"] <= GROWTH_GOAL
    result["passed"] = passed
    sys.stdout.write(json.dumps(result) + "\n")
    if not passed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
