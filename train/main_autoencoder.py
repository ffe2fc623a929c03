"""Train the image autoencoder on pictures that fit in memory, and measure the scaling of its latents.

In: directories of pictures. Out, in `--output_dir`: `ae.safetensors`, `ae_config.json`, and `ae_log.jsonl` (one object per
progress line, the last one the result). With the scaling in the config, the latents have mean 0 and variance 1 over the training
pictures, every channel the same variance. Any number of processes gives the same training, up to rounding: `--batch_size` is
the global batch.

    torchrun --standalone --nproc_per_node=2 train/main_autoencoder.py --image_dir runs/quickstart/data/train/images \
        --val_dir runs/quickstart/data/val/images --output_dir runs/quickstart/base
"""

import argparse
import logging
import math
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import Parameter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from modeling.autoencoder import AttnBlock, AutoEncoder, AutoEncoderConfig, ResnetBlock, save_autoencoder
from train.distributed.session import World, run_entry, session
from train.metrics.image import PictureFidelity
from train.warm_up_run import (
    ProgressLog,
    batch_rows,
    learning_rate_factor,
    of_rank,
    require_writable,
    summed,
)

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LOG_NAME = "ae_log.jsonl"
START_LOGVAR = -10.0
CALIBRATION_IMAGES = 2048
"""How many training pictures, evenly spaced, the latents' mean and variance are measured on, at most."""
MOMENT_MEMORY = 0.9
"""Share of the old value in the running second moments of the latents."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How to train.

    Attributes:
        total_steps: optimizer updates.
        minutes: if above 0, the schedule follows the clock instead of the steps, and ends with it.
        batch_size: pictures per step over all processes.
        lr: peak learning rate, after `warmup` (a share of the run) and before the cosine down to 0.
        edge_weight: weight of the L1 difference of neighbouring pixels' differences.
        kl_weight: weight of the KL divergence per latent number.
        latent_noise: standard deviation of the noise added to the latents that are decoded, as a share of each channel's own.
            Errors of that size, such as a generator makes, then cost little in the picture.
        seed: of the weights, the order and the noise.
        log_every: steps between progress lines.
    """

    total_steps: int
    minutes: float
    batch_size: int
    lr: float
    warmup: float
    edge_weight: float
    kl_weight: float
    latent_noise: float
    seed: int
    log_every: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("minutes", "edge_weight", "kl_weight", "latent_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"--{name} is {getattr(self, name)}; it must be 0 or more")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr is {self.lr}; it must be above 0")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"--warmup is {self.warmup}; it is a share of the run, at least 0 and below 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Read, train, calibrate, report, write."""
    args = parse_args(argv)
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in fields(Recipe)})
    config = config_of(args)
    require_writable(args.output_dir)
    images = read_images(args.image_dir, config.resolution)
    held_out = read_images(args.val_dir, config.resolution) if args.val_dir else images[:0]

    with session(seed=recipe.seed) as world:
        if recipe.batch_size < world.size:
            raise ValueError(
                f"--batch_size {recipe.batch_size} leaves some of the {world.size} processes without a picture"
            )
        log = ProgressLog(args.output_dir / LOG_NAME if world.is_main else None)
        torch.manual_seed(recipe.seed)  # the session's seed differs per rank, the weights must not
        model = initialise(AutoEncoder(config)).to(world.device)
        num_params = sum(p.numel() for p in model.parameters())
        log.say(f"{len(images)} pictures of {config.resolution} px, {num_params:,} parameters")
        for row in train(model, images, recipe, world):
            log.write(row, tell(row))
        model.eval().requires_grad_(False)
        calibrate(model, images, world)
        result = report(model, images, held_out, recipe, world)
        log.write(result, tell(result))
        if world.is_main:
            save_autoencoder(model, args.output_dir)
            log.say(f"written to {args.output_dir}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; their defaults are the quickstart's autoencoder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--image_dir", type=Path, action="append", required=True, help="pictures to train on; repeatable"
    )
    parser.add_argument(
        "--val_dir", type=Path, action="append", default=[], help="held-out pictures; repeatable"
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="model directory to write into")
    size = parser.add_argument_group("size")
    size.add_argument(
        "--resolution", type=int, default=64, help="side in pixels; others are scaled and cut to the centre"
    )
    size.add_argument("--ch", type=int, default=8, help="width at full resolution")
    size.add_argument(
        "--ch_mult",
        type=int,
        nargs="+",
        default=[1, 2, 4, 4],
        help="width of each level in multiples of --ch",
    )
    size.add_argument("--num_res_blocks", type=int, default=1)
    size.add_argument("--z_channels", type=int, default=8)
    size.add_argument("--num_groups", type=int, default=4, help="groups of every GroupNorm; divides --ch")
    how = parser.add_argument_group("training (see Recipe)")
    how.add_argument("--total_steps", type=int, default=1300)
    how.add_argument("--minutes", type=float, default=0.0, help="follow the clock instead of --total_steps")
    how.add_argument("--batch_size", type=int, default=16, help="pictures per step over all processes")
    how.add_argument("--lr", type=float, default=2e-3)
    how.add_argument("--warmup", type=float, default=0.05, help="share of the run")
    how.add_argument("--edge_weight", type=float, default=0.0)
    how.add_argument("--kl_weight", type=float, default=1e-5)
    how.add_argument(
        "--latent_noise", type=float, default=0.1, help="share of each channel's standard deviation"
    )
    how.add_argument("--seed", type=int, default=0)
    how.add_argument("--log_every", type=int, default=50, help="steps between progress lines")
    return parser.parse_args(argv)


def config_of(args: argparse.Namespace) -> AutoEncoderConfig:
    """The size the flags ask for, not scaled yet."""
    config = AutoEncoderConfig(
        ch=args.ch,
        ch_mult=tuple(args.ch_mult),
        num_res_blocks=args.num_res_blocks,
        z_channels=args.z_channels,
        num_groups=args.num_groups,
        scale_factor=1.0,
        shift_factor=0.0,
        resolution=args.resolution,
    )
    if config.resolution % config.downsample:
        raise ValueError(
            f"--resolution {config.resolution} is not a multiple of the {config.downsample} pixels per latent"
        )
    return config


def read_images(folders: Sequence[Path], resolution: int) -> Tensor:
    """Every picture directly in the folders, by name: `n 3 hh ww` uint8, scaled and cut to squares of `resolution`.

    Raises:
        ValueError: if a folder does not exist or has no picture, or naming the picture that cannot be read.
    """
    pictures = []
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(
                f"{folder}: no such directory; --image_dir and --val_dir name directories of pictures"
            )
        files = sorted(f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES)
        if not files:
            raise ValueError(f"{folder}: no picture here (looked for {', '.join(IMAGE_SUFFIXES)})")
        pictures += [read_image(file, resolution) for file in files]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def read_image(file: Path, resolution: int) -> np.ndarray:
    """`hh ww 3` uint8; see `read_images`."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{file}: not a readable picture ({error}); repair or remove it") from error
    if image.size != (resolution, resolution):
        scale = resolution / min(image.size)
        image = image.resize(
            [max(resolution, round(side * scale)) for side in image.size], Image.Resampling.BICUBIC
        )
        left, top = ((side - resolution) // 2 for side in image.size)
        image = image.crop((left, top, left + resolution, top + resolution))
    return np.asarray(image)


def initialise(model: AutoEncoder) -> AutoEncoder:
    """Start without posterior noise and with every residual branch at zero: the pictures get through from the first step."""
    with torch.no_grad():
        for moments in model.encoder.conv_out.parameters():
            moments[model.config.z_channels :] = START_LOGVAR if moments.ndim == 1 else 0.0
        for part in model.modules():
            if isinstance(part, ResnetBlock | AttnBlock):
                last = part.conv2 if isinstance(part, ResnetBlock) else part.proj_out
                for param in last.parameters():
                    param.zero_()
    return model


def train(model: AutoEncoder, images: Tensor, recipe: Recipe, world: World) -> Iterator[dict[str, float]]:
    """Train in place; yields a progress row every `log_every` steps and after the last."""
    params = list(model.parameters())
    optimizer = Optimizer(params, recipe.lr)
    batches = batch_rows(len(images), recipe.batch_size, recipe.seed)
    moments = torch.zeros(model.config.z_channels, device=world.device)
    began, progress, step = time.monotonic(), 0.0, 0
    while progress < 1.0:
        rows, generator = next(batches), torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        noise = torch.randn(2, len(rows), *latent_shape(model.config), generator=generator)
        pixels = to_pixels(images[of_rank(world, rows)], world.device)
        noises = [of_rank(world, n).to(world.device) for n in noise]
        sums, seen = losses(model, pixels, noises, recipe, moments)
        weights = sums.new_tensor([1.0, recipe.edge_weight, recipe.kl_weight])
        grads = torch.autograd.grad(sums @ weights / recipe.batch_size, params)

        # Everything the processes must agree on travels in one sum: gradients, losses, latent moments and the first one's clock.
        clock = sums.new_tensor([time.monotonic() - began if world.is_main else 0.0])
        *grads_summed, sums, seen, clock = summed([*grads, sums.detach(), seen, clock])
        for param, grad in zip(params, grads_summed, strict=True):
            param.grad = grad
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step(learning_rate_factor(progress, recipe.warmup))

        moments.lerp_(seen / recipe.batch_size, 1 - MOMENT_MEMORY)
        step += 1
        progress = float(clock) / (60 * recipe.minutes) if recipe.minutes else step / recipe.total_steps
        if step % recipe.log_every == 0 or progress >= 1:
            mse, edge, kl = (float(x) / recipe.batch_size for x in sums)
            if not math.isfinite(mse + kl + float(norm)):
                raise FloatingPointError(
                    f"step {step}: mse {mse}, kl {kl}, gradient norm {float(norm)}; lower --lr"
                )
            left_s = float(clock) * (1 / progress - 1) if progress < 1 else 0.0
            yield dict(
                step=step, mse=mse, edge=edge, kl=kl, norm=float(norm), seconds=float(clock), left_s=left_s
            )


class Optimizer:
    """Muon for the convolutions, each seen as a matrix from its inputs to its outputs; Adam for biases and norms.

    Muon wants matrices; they are views of the weights. In single runs of 300 steps on the quickstart's pictures it came to
    24.8 dB, and Adam alone, which also began with more posterior noise, to 22.2 dB.
    """

    def __init__(self, params: Sequence[Parameter], lr: float):
        self._lr = lr
        self._params = params
        self._kernels = [(p, Parameter(p.detach().flatten(1))) for p in params if p.ndim > 1]
        rest = [p for p in params if p.ndim == 1]
        self._parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon([m for _, m in self._kernels], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, betas=(0.9, 0.95), weight_decay=0.0),
        ]

    def step(self, factor: float) -> None:
        """Update with `factor` of the peak learning rate and forget the gradients."""
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = self._lr * factor
            part.step()
        for param in self._params:
            param.grad = None


def losses(
    model: AutoEncoder, pixels: Tensor, noises: Sequence[Tensor], recipe: Recipe, moments: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses of one batch and what it says of the latents.

    Args:
        model: unscaled (scale 1, shift 0).
        pixels: `b 3 hh ww` in [-1, 1].
        noises: two of `b z h w`, standard normal: for the posterior, and for the noise added on top.
        recipe: of which `latent_noise` counts here.
        moments: `z`, second moment of each latent channel so far.

    Returns:
        `3`, mean squared error, edge error and KL divergence of each picture, summed over the pictures; and `z`, the second
        moments of the posterior means, summed likewise.
    """
    mean, logvar = model.encode_moments(pixels)
    spread = recipe.latent_noise * moments.sqrt()[:, None, None]
    decoded = model.decode(mean + torch.exp(0.5 * logvar) * noises[0] + spread * noises[1])
    difference = decoded - pixels
    edge = difference.diff(dim=2).abs().mean(dim=(1, 2, 3)) + difference.diff(dim=3).abs().mean(dim=(1, 2, 3))
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(dim=(1, 2, 3))
    sums = torch.stack([difference.square().mean(dim=(1, 2, 3)).sum(), edge.sum(), kl.sum()])
    return sums, mean.detach().square().mean(dim=(2, 3)).sum(0)


def calibrate(model: AutoEncoder, images: Tensor, world: World) -> None:
    """Give the latents of these images mean 0 and variance 1, every channel the same variance.

    The channels are scaled in the last layer of the encoder and back in the first of the decoder, so that a picture comes out as
    before; a generator then has to be equally exact in every channel. The mean over all channels becomes the config's shift.
    """
    sums = summed([latent_sums(model, images[:: math.ceil(len(images) / CALIBRATION_IMAGES)], world)])[0]
    mean, square = sums[0] / sums[2], sums[1] / sums[2]
    std = (square - mean.square()).clamp_min(1e-12).sqrt()
    shift = float((mean / std).mean())
    scale = 1 / math.sqrt(float((square / std.square()).mean()) - shift**2)
    model.config = replace(model.config, scale_factor=scale, shift_factor=shift)

    std = std.float()
    with torch.no_grad():
        weight, bias = model.encoder.conv_out.parameters()
        weight[: len(std)].div_(std[:, None, None, None])
        bias[: len(std)].div_(std)
        bias[len(std) :].sub_(2 * std.log())
        model.decoder.conv_in.weight.mul_(std[:, None, None])


def latent_sums(model: AutoEncoder, images: Tensor, world: World, chunk: int = 64) -> Tensor:
    """This process's share of the unscaled posterior means, per channel: `3 z` float64, their sum, sum of squares and number."""
    sums = torch.zeros(3, model.config.z_channels, dtype=torch.float64, device=world.device)
    for part in of_rank(world, images).split(chunk):
        mean = model.encode_moments(to_pixels(part, world.device))[0].double()
        sums += torch.stack(
            [mean.sum((0, 2, 3)), mean.square().sum((0, 2, 3)), torch.ones_like(mean).sum((0, 2, 3))]
        )
    return sums


def report(
    model: AutoEncoder, images: Tensor, held_out: Tensor, recipe: Recipe, world: World, chunk: int = 64
) -> dict[str, Any]:
    """The result row: PSNR of pictures encoded (posterior mean) and decoded, and the same with `latent_noise` on the latents."""
    pictures = held_out if len(held_out) else images
    generator = torch.Generator(device=world.device).manual_seed(recipe.seed)
    exact, noised = PictureFidelity(), PictureFidelity()
    for part in of_rank(world, pictures).split(chunk):
        latents = model.encode(to_pixels(part, world.device))
        noise = torch.randn(latents.shape, generator=generator, device=world.device)
        for metric, code in ((exact, latents), (noised, latents + recipe.latent_noise * noise)):
            for picture, truth in zip(to_uint8(model.decode(code)), part, strict=True):
                metric.update(picture.permute(1, 2, 0).cpu().numpy(), truth.permute(1, 2, 0).numpy())
    sums = torch.tensor(
        [exact.psnr_sum, noised.psnr_sum, exact.count], dtype=torch.float64, device=world.device
    )
    exact_sum, noised_sum, count = summed([sums])[0].tolist()
    return {
        "measured_on": "held-out pictures" if len(held_out) else "training pictures (no --val_dir)",
        "pictures": int(count),
        "psnr_db": exact_sum / count,
        "psnr_noised_db": noised_sum / count,
        "latent_noise": recipe.latent_noise,
        "autoencoder": model.config.to_json(),
        "recipe": asdict(recipe),
    }


def latent_shape(config: AutoEncoderConfig) -> tuple[int, int, int]:
    """`z h w` of a training image."""
    side = config.resolution // config.downsample
    return config.z_channels, side, side


def to_pixels(images: Tensor, device: torch.device) -> Tensor:
    """uint8 to [-1, 1]."""
    return images.to(device).float() / 127.5 - 1


def to_uint8(pixels: Tensor) -> Tensor:
    """[-1, 1], or a little outside, to uint8."""
    return ((pixels + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def tell(row: dict[str, Any]) -> str:
    """A row of the log in words."""
    if "psnr_db" in row:
        return (
            "PSNR {psnr_db:.2f} dB ({psnr_noised_db:.2f} dB with noise {latent_noise:g} on the latents), "
            "{pictures} {measured_on}".format(**row)
        )
    return "step {step}  mse {mse:.5f}  edge {edge:.4f}  kl {kl:.2f}  {seconds:.0f} s, {left_s:.0f} s left".format(
        **row
    )


if __name__ == "__main__":
    run_entry(main)
