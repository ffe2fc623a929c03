"""Train the vision tower on named things in pictures, before the whole model: SigLIP's sigmoid loss between regions and names.

In: a COCO JSON with masks and `expressions` (the first one names the thing in full) and the model directory's `vit_config.json`
and `tokenizer.json`. Out, in `--output_dir`: `vit_model.safetensors` (the tower alone, keys without prefix), `vit_log.jsonl`. The
trainer starts the tower from it with `--vit_path`. A region is the mean of the tower's patches under its mask, a name the mean of
its tokens' embeddings; the text side is thrown away. Every region is compared with every name of the data set.

    torchrun --standalone --nproc_per_node=2 train/main_siglip.py --coco_path runs/quickstart/data/refer_train.json \
        --data_dir runs/quickstart/data --output_dir runs/quickstart/base

Source: sigmoid loss of arXiv 2303.15343, on regions instead of whole pictures.
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset_base import SkipSample
from data.packing import patchify_pixels
from data.sources import CocoSource, Record
from data.tokens import Tokenizer
from data.transforms.boxes import read_mask
from data.transforms.image import ImageTransform
from modeling.bagel.init import initial_value
from modeling.huggingface import TOWER
from modeling.ops.attention import AttentionPlan
from modeling.ops.patch import normalise_pixels
from modeling.source import read_source
from modeling.towers import TowerConfig, tower_of
from train.distributed.session import World, run_entry, session
from train.warm_up_run import (
    ProgressLog,
    batch_rows,
    learning_rate_factor,
    of_rank,
    require_writable,
    summed,
)

logger = logging.getLogger(__name__)

LOG_NAME = "vit_log.jsonl"
MAX_NAMES = 4096
"""Every region meets every name, so there may not be too many."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Regions:
    """Pictures of one size with their named regions.

    Attributes:
        patches: `n v (p p 3)` uint8.
        weights: per picture `r v`, each patch's share of a region; rows sum to 1.
        names: per picture `r` int64, rows of the list of names.
        hw: patch rows and columns of every picture.
    """

    patches: Tensor
    weights: list[Tensor]
    names: list[Tensor]
    hw: tuple[int, int]


class RegionNamer(nn.Module):
    """The tower and what compares its regions with names."""

    def __init__(self, config: TowerConfig, vocab_size: int):
        super().__init__()
        width, self.side = config.hidden_size, config.positions_per_side
        self.vit = tower_of(config).build(config)
        self.of_region = nn.Linear(width, width, bias=False)
        self.of_token = nn.Embedding(vocab_size, width)
        # The start of the paper: temperature 10, and a bias that makes every pair a non-match.
        self.log_scale = nn.Parameter(torch.tensor(math.log(10.0)))
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def forward(self, data: Regions, rows: Tensor, tokens: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Compare the regions of some pictures with all names.

        Args:
            data: all pictures.
            rows: which of them.
            tokens: ids of every name.

        Returns:
            logits `r k` and the right name of each region, `r`.
        """
        h, w = data.hw
        count, device = len(rows), self.bias.device
        lens = [h * w] * count
        plan = AttentionPlan.build(lens, lens, ["full"] * count, [0] * count, device)
        patches = normalise_pixels(data.patches[rows].to(device).flatten(0, 1))
        position = torch.arange(h)[:, None] * self.side + torch.arange(w)[None]
        grid = self.vit(patches, position.flatten().repeat(count).to(device), (data.hw,) * count, plan)
        pairs = zip(grid.unflatten(0, (count, h * w)), rows.tolist(), strict=True)
        seen = torch.cat([data.weights[i].to(device) @ g for g, i in pairs])
        said = torch.stack([self.of_token(t.to(device)).mean(0) for t in tokens])
        cosine = F.normalize(self.of_region(seen), dim=-1) @ F.normalize(said, dim=-1).T
        return cosine * self.log_scale.exp() + self.bias, torch.cat(
            [data.names[i] for i in rows.tolist()]
        ).to(device)


def main(argv: Sequence[str] | None = None) -> None:
    """Read, train, report, write."""
    args = parse_args(argv)
    require_writable(args.output_dir)
    config = read_source(args.model_path or args.output_dir).config
    tokenizer = Tokenizer(args.model_path or args.output_dir)
    side, patch = config.vit.image_size, config.vit.patch_size
    transform = ImageTransform(max_image_size=side, min_image_size=side, stride=patch)
    names: list[str] = []
    data = read_regions(args.coco_path, args.data_dir, transform, patch, names)
    held_out = (
        read_regions(args.val_coco_path, args.data_dir, transform, patch, names)
        if args.val_coco_path
        else data
    )
    if len(names) > MAX_NAMES:
        raise ValueError(
            f"{args.coco_path}: {len(names)} different names, at most {MAX_NAMES} can be compared at once"
        )
    with session(seed=args.seed) as world:
        torch.set_float32_matmul_precision(args.matmul_precision)
        log = ProgressLog(args.output_dir / LOG_NAME if world.is_main else None)
        torch.manual_seed(args.seed)  # the session's seed differs per rank, the weights must not
        model = RegionNamer(config.vit, len(tokenizer)).to(world.device)
        with torch.no_grad():
            for name, p in model.vit.named_parameters():
                p.copy_(initial_value(f"vit_model.{name}", p.shape, config, args.seed))
        log.say(f"{len(data.patches)} pictures, {sum(map(len, data.names))} regions, {len(names)} names")
        tokens = [tokenizer.encode(name) for name in names]
        for row in train(model, data, tokens, args, world):
            log.write(
                row,
                "step {step}  loss {loss:.4f}  named {named:.3f}  {seconds:.0f} s, {left_s:.0f} s left".format(
                    **row
                ),
            )
        right, count = accuracy(model, held_out, tokens, world)
        result = {"named_right": right, "regions": count, "names": len(names)}
        log.write(result, f"named right {right:.4f} of {count} regions among {len(names)} names"
                  + (", held out" if args.val_coco_path else ", training regions"))  # fmt: skip
        if world.is_main:
            tensors = {n: p.detach().cpu().contiguous() for n, p in model.vit.named_parameters()}
            draft = (args.output_dir / TOWER).with_suffix(".tmp")
            save_file(tensors, draft)
            draft.replace(args.output_dir / TOWER)
            log.say(f"written to {args.output_dir / TOWER}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; their defaults are the quickstart's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--coco_path", type=Path, required=True, help="COCO JSON with masks and expressions")
    parser.add_argument("--val_coco_path", type=Path, help="the same, held out")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="what the JSON's file names are relative to"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="model directory to write into")
    parser.add_argument(
        "--model_path", type=Path, help="directory with the configurations (default: --output_dir)"
    )
    parser.add_argument("--total_steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=32, help="pictures per step over all processes")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    parser.add_argument("--matmul_precision", choices=["highest", "high", "medium"], default="medium")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log_every", type=int, default=50, help="steps between progress lines")
    args = parser.parse_args(argv)
    for name in ("total_steps", "batch_size", "log_every"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    return args


def read_regions(
    path: Path, data_dir: Path, transform: ImageTransform, patch: int, names: list[str]
) -> Regions:
    """All pictures of a COCO JSON; names not met before are added to `names`.

    Raises:
        ValueError: naming the file and record that cannot be used.
    """
    source = CocoSource(path, data_dir)
    number = {name: i for i, name in enumerate(names)}
    patches, weights, named = [], [], []
    hw: tuple[int, int] | None = None
    for i in range(len(source)):
        record = source.read(i)
        try:
            pixels, masks, said = _read_record(record, transform)
        except SkipSample as e:
            raise ValueError(f"{record.where}: {e.message}; repair or remove it") from e
        size = (pixels.shape[1] // patch, pixels.shape[2] // patch)
        if hw is not None and size != hw:
            raise ValueError(
                f"{record.where}: pictures must be of one size, this one differs from those before"
            )
        hw = size
        patches.append(patchify_pixels(pixels, patch))
        share = F.adaptive_avg_pool2d(masks[:, None].float(), size).flatten(1)
        weights.append(share / share.sum(1, keepdim=True).clamp(min=1e-6))
        named.append(torch.tensor([number.setdefault(name, len(number)) for name in said]))
    names[:] = list(number)
    assert hw is not None  # the source refuses to be empty
    return Regions(patches=torch.stack(patches), weights=weights, names=named, hw=hw)


def _read_record(record: Record, transform: ImageTransform) -> tuple[Tensor, Tensor, list[str]]:
    """Pixels `3 hh ww`, masks `r h w` of the original picture, names."""
    picture = record.open_image(record.data["image"]["file_name"])
    masks, said = [], []
    for annotation in record.data["annotations"]:
        what = f"annotation {annotation.get('id')}"
        masks.append(torch.from_numpy(read_mask(annotation.get("segmentation"), picture.size, what)))
        if not annotation.get("expressions"):
            raise SkipSample("no_expression", f"{what} has no expressions")
        said.append(annotation["expressions"][0])
    return transform(picture), torch.stack(masks), said


def train(
    model: RegionNamer, data: Regions, tokens: list[Tensor], args: argparse.Namespace, world: World
) -> Iterator[dict[str, float]]:
    """Train in place; yields a progress row every `log_every` steps and after the last."""
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batches = batch_rows(len(data.patches), args.batch_size, args.seed)
    began = time.monotonic()
    for step in range(1, args.total_steps + 1):
        logits, right = model(data, of_rank(world, next(batches)), tokens)
        loss = sigmoid_loss(logits, right)
        grads = torch.autograd.grad(loss, params)
        facts = torch.stack(
            [loss.detach(), (logits.argmax(1) == right).sum().float(), logits.new_tensor(len(right))]
        )
        *grads_summed, facts = summed([*grads, facts])
        total, hits, count = facts.tolist()
        for param, grad in zip(params, grads_summed, strict=True):
            param.grad = grad / count
        for group in optimizer.param_groups:
            group["lr"] = args.lr * learning_rate_factor(step / args.total_steps, args.warmup)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if step % args.log_every == 0 or step == args.total_steps:
            if not math.isfinite(total):
                raise ValueError(f"step {step}: the loss is {total}; lower --lr")
            seconds = time.monotonic() - began
            left_s = seconds * (args.total_steps / step - 1)
            yield {
                "step": step,
                "loss": total / count,
                "named": hits / count,
                "seconds": seconds,
                "left_s": left_s,
            }


def sigmoid_loss(logits: Tensor, right: Tensor) -> Tensor:
    """Sum over regions of the negative log likelihood of every pair, match or not.

    Args:
        logits: `r k`.
        right: `r` int64, the matching name.

    Source: arXiv 2303.15343.
    """
    sign = 2 * F.one_hot(right, logits.shape[1]) - 1
    return -F.logsigmoid(sign * logits).sum()


@torch.no_grad()
def accuracy(
    model: RegionNamer, data: Regions, tokens: list[Tensor], world: World, chunk: int = 64
) -> tuple[float, int]:
    """Share of regions whose best name is theirs, and their number, over all processes."""
    hits = torch.zeros(2, dtype=torch.float64, device=world.device)
    for rows in of_rank(world, torch.arange(len(data.patches))).split(chunk):
        logits, right = model(data, rows, tokens)
        hits += torch.stack([(logits.argmax(1) == right).sum(), right.new_tensor(len(right))])
    total: list[Any] = summed([hits])[0].tolist()
    return total[0] / total[1], int(total[1])


if __name__ == "__main__":
    run_entry(main)
