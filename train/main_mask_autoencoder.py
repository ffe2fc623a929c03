"""Train the mask autoencoder on the masks of a mixture, for the mask head of type `autoencoder`.

In: the mixture YAML of the run that follows; the masks of its groups are what is learnt, those of its `val` groups what is
measured. Out, in `--output_dir`: `mask_autoencoder.safetensors`, `mask_autoencoder.json`, and `mask_ae_log.jsonl` (one object per
progress line, the last one the result). Any number of processes gives the same training, up to rounding.

    torchrun --standalone --nproc_per_node=2 train/main_mask_autoencoder.py --dataset_config_file configs/perception_gpt.yaml \
        --model_path runs/segmentation/base --output_dir runs/segmentation/codes
    torchrun ... train/main.py ... --mask_path runs/segmentation/codes
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from data.dataset_base import SkipSample
from data.mixture import Group, build_groups, load_mixture, load_validation
from data.order import sample_rng
from data.tokens import Tokenizer
from modeling.losses.masks import DICE_EPS
from modeling.mask_autoencoder import MaskAutoencoder, MaskAutoencoderConfig, save_mask_autoencoder
from train.distributed.session import World, run_entry, session
from train.main_autoencoder import Optimizer
from train.metrics.masks import mask_iou
from train.warm_up_run import (
    ProgressLog,
    batch_rows,
    learning_rate_factor,
    of_rank,
    require_writable,
    summed,
)

logger = logging.getLogger(__name__)

LOG_NAME = "mask_ae_log.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        total_steps: optimizer updates.
        batch_size: masks per step over all processes.
        lr: peak learning rate, after `warmup` (a share of the run) and before the cosine down to 0.
        code_noise: standard deviation of the noise that is added to codes, as a share of each number's own over the batch:
            errors of that size, such as a language model makes, then cost little in the mask.
        seed: of the weights, the order and the noise.
        log_every: steps between progress lines.
    """

    total_steps: int
    batch_size: int
    lr: float
    warmup: float
    code_noise: float
    seed: int
    log_every: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        if not 0 <= self.code_noise < math.inf:
            raise ValueError(f"--code_noise is {self.code_noise}; it must be 0 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}; it must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup is {self.warmup}; it is a share of the run, at least 0 and below 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, train, report, write."""
    args = parse_args(argv)
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    sizes = {f.name: getattr(args, f.name) for f in fields(MaskAutoencoderConfig)}
    config = MaskAutoencoderConfig.from_json(sizes, "flags")
    require_writable(args.output_dir)
    tokenizer = Tokenizer(args.model_path)
    groups = build_groups(load_mixture(args.dataset_config_file), tokenizer)
    val_groups = build_groups(load_validation(args.dataset_config_file), tokenizer)
    masks = read_masks(groups, config.resolution, args.max_masks, recipe.seed)
    if not len(masks):
        raise ValueError(f"{args.dataset_config_file}: none of its groups has a mask")
    held_out = read_masks(val_groups, config.resolution, args.max_masks, recipe.seed)

    with session(seed=recipe.seed) as world:
        if recipe.batch_size < world.size:
            raise ValueError(
                f"--batch_size {recipe.batch_size} leaves some of the {world.size} processes without a mask"
            )
        log = ProgressLog(args.output_dir / LOG_NAME if world.is_main else None)
        torch.manual_seed(recipe.seed)  # the session's seed differs per rank, the weights must not
        model = MaskAutoencoder(config).to(world.device)
        count = sum(p.numel() for p in model.parameters())
        log.say(
            f"{len(masks)} masks of {config.resolution} px, {len(held_out)} held out, {count:,} parameters"
        )
        for row in train(model, masks, recipe, world):
            log.write(row, "step {step}  bce {bce:.4f}  dice {dice:.4f}  {seconds:.0f} s".format(**row))
        result = report(model.eval(), held_out if len(held_out) else masks, world)
        result |= {"measured_on": "held-out masks" if len(held_out) else "training masks (no val groups)"}
        result |= {"mask_autoencoder": asdict(config), "recipe": asdict(recipe)}
        log.write(result, "mean IoU {mean_iou:.4f} of {masks} {measured_on}".format(**result))
        if world.is_main:
            save_mask_autoencoder(model, args.output_dir)
            log.say(f"written to {args.output_dir}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; sizes are those of scripts/segmentation/run.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_config_file", type=Path, required=True, help="mixture YAML")
    parser.add_argument("--model_path", type=Path, required=True, help="directory with the tokenizer")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--max_masks", type=int, default=20000, help="masks held in memory, at most")
    size = parser.add_argument_group("size (see MaskAutoencoderConfig)")
    size.add_argument("--resolution", type=int, default=64, help="side of the masks in pixels")
    size.add_argument("--width", type=int, default=16)
    size.add_argument(
        "--down", type=int, nargs=4, default=[1, 1, 1, 1], help="blocks of the encoder's stages"
    )
    size.add_argument("--up", type=int, nargs=4, default=[1, 1, 1, 1], help="blocks of the decoder's stages")
    size.add_argument("--code", type=int, default=128)
    size.add_argument("--norm", choices=("layer", "batch"), default="layer")
    how = parser.add_argument_group("training (see Recipe)")
    how.add_argument("--total_steps", type=int, default=1500)
    how.add_argument("--batch_size", type=int, default=64, help="masks per step over all processes")
    how.add_argument("--lr", type=float, default=2e-3)
    how.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    how.add_argument("--code_noise", type=float, default=0.1)
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--log_every", type=int, default=50, help="steps between progress lines")
    return parser.parse_args(argv)


def read_masks(groups: Sequence[Group], resolution: int, limit: int, seed: int) -> Tensor:
    """`n r r` float32 in [0, 1]: the masks of the groups' records, stretched to a square; bad records are left out."""
    found: list[Tensor] = []
    for group in groups:
        for index in range(len(group.source)):
            if len(found) >= limit:
                break
            rng = sample_rng(seed, group.name, index, "sample")
            try:
                sample = group.dataset.sample(group.source.read(index), rng)
            except SkipSample as e:
                logger.warning("%s record %d is left out: %s", group.name, index, e.message)
                continue
            masks = [region.mask[None, None].float() for region in sample.regions if region.mask.numel()]
            size = (resolution, resolution)
            found += [F.interpolate(m, size, mode="bilinear", antialias=True)[0] for m in masks]
    return torch.cat(found[:limit]) if found else torch.zeros(0, resolution, resolution)


def train(model: MaskAutoencoder, masks: Tensor, recipe: Recipe, world: World) -> Iterator[dict[str, Any]]:
    """Train in place; yields a progress row every `log_every` steps and after the last."""
    params = list(model.parameters())
    optimizer = Optimizer(params, recipe.lr)
    batches, began = batch_rows(len(masks), recipe.batch_size, recipe.seed), time.monotonic()
    for step in range(1, recipe.total_steps + 1):
        rows, generator = next(batches), torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        noise = torch.randn(len(rows), model.config.code, generator=generator)
        truth = masks[of_rank(world, rows)].to(world.device)
        sums = losses(model, truth, of_rank(world, noise).to(world.device), recipe)
        grads = torch.autograd.grad(sums.sum() / recipe.batch_size, params)
        *grads_summed, sums = summed([*grads, sums.detach()])
        for param, grad in zip(params, grads_summed, strict=True):
            param.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(learning_rate_factor(step / recipe.total_steps, recipe.warmup))
        if step % recipe.log_every == 0 or step == recipe.total_steps:
            bce, dice = (float(x) / recipe.batch_size for x in sums)
            if not math.isfinite(bce + dice + float(norm)):
                raise FloatingPointError(f"step {step}: bce {bce}, dice {dice}, norm {norm}; lower --lr")
            yield dict(step=step, bce=bce, dice=dice, norm=float(norm), seconds=time.monotonic() - began)


def losses(model: MaskAutoencoder, masks: Tensor, noise: Tensor, recipe: Recipe) -> Tensor:
    """`2`, binary cross entropy (mean over pixels) and Dice loss of masks `b r r` in [0, 1], summed over them.

    Args:
        model: the autoencoder.
        masks: truth, which may be soft at edges.
        noise: `b c`, standard normal.
        recipe: of which `code_noise` counts here.
    """
    code = model.encode(masks)
    spread = code.detach().std(0, unbiased=False)
    logits = model.decode(code + recipe.code_noise * spread * noise).float()
    bce = F.binary_cross_entropy_with_logits(logits, masks, reduction="none").mean(dim=(1, 2))
    p = logits.sigmoid()
    both, each = (p * masks).sum((1, 2)), p.sum((1, 2)) + masks.sum((1, 2))
    return torch.stack([bce.sum(), (1 - (2 * both + DICE_EPS) / (each + DICE_EPS)).sum()])


@torch.no_grad()
def report(model: MaskAutoencoder, masks: Tensor, world: World, chunk: int = 64) -> dict[str, Any]:
    """Mean intersection over union of masks that are encoded and decoded."""
    total = 0.0
    mine = of_rank(world, masks)
    for part in mine.split(chunk):
        found = model.decode(model.encode(part.to(world.device))).cpu() > 0
        truth = part > 0.5
        total += sum(mask_iou(a.numpy(), b.numpy()) for a, b in zip(found, truth, strict=True))
    sums = torch.tensor([total, len(mine)], dtype=torch.float64, device=world.device)
    iou, count = summed([sums])[0].tolist()
    return {"mean_iou": iou / count, "masks": int(count)}


if __name__ == "__main__":
    run_entry(main)
