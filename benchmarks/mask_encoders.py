"""One image encoder for language and masks, or two: parameters, peak memory, time and cIoU of the three `vision_sharing` modes.

    python benchmarks/mask_encoders.py [--steps 300] [--size small|sam_b] [--device cpu|cuda]

Makes scenes of coloured discs on noise and a small model for each mode (`vlm`: the tower's grid through a neck; `sam`: SAM's
encoder is the tower; `separate`: SAM's encoder beside the tower, trained as well, since here it starts from nothing), trains it
for `--steps` steps of mask losses with all else equal, and measures: parameters; peak memory of a training step, and the median
time of the forward pass that answers 16 pictures after 3 warm-up passes (synchronised; on CUDA torch's own peak, on a CPU the
process's, each mode in a process of its own); cIoU on held-out scenes. `--size sam_b` gives encoders and decoder the published
SAM-B sizes, keeps the separate encoder frozen and trains nothing. Prints a table and, per mode, one JSON line.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.packing import pack
from data.tokens import SpecialTokens
from data.transforms import LongestSide
from data.types import PackedBatch, Region, Sample, Segment
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.build import fill_model, initial_values
from modeling.qwen2.config import Qwen2Config
from modeling.sam.config import SamVisionConfig
from modeling.siglip.config import SiglipConfig
from modeling.types import FlowState
from train.args import ParamArgs
from train.metrics.masks import overlap_counts
from train.objective import Objective
from train.param_manager import freeze

MODES = ("vlm", "sam", "separate")
COLOURS = ((230, 40, 40), (245, 230, 45), (45, 205, 70), (50, 105, 255))
SPECIAL = SpecialTokens(begin=1, end=2, image_start=3, image_end=4, anchors={"mask": 6})
SMALL = {
    "side": 64, "patch": 8, "batch": 16,
    "vit": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3, "num_attention_heads": 3},
    "encoder": {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "mlp_dim": 288, "image_size": 64,
                "patch_size": 8, "window_size": 4, "global_attn_indexes": [1, 3], "output_channels": 64},
    "decoder": {"hidden_size": 64, "num_attention_heads": 4, "mlp_dim": 128, "iou_head_hidden_dim": 64},
    "llm": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 2, "num_attention_heads": 3},
}  # fmt: skip
SAM_B = {
    "side": 1024, "patch": 16, "batch": 1,
    "vit": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "encoder": {}, "decoder": {},
    "llm": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 2, "num_attention_heads": 8},
}  # fmt: skip
SIZES: dict[str, dict[str, Any]] = {"small": SMALL, "sam_b": SAM_B}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mode", choices=MODES, help="this one alone, as a line of JSON")
    args = parser.parse_args()
    if args.mode:
        print(json.dumps(measure(args)), flush=True)
        return
    rows = []
    for mode in MODES:
        command = [sys.executable, __file__, *sys.argv[1:], "--mode", mode]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    print(
        f"{'vision_sharing':<16}{'parameters':>14}{'trained':>14}{'peak MiB':>10}{'ms':>9}{'cIoU':>8}{'steps':>7}"
    )
    for row in rows:
        iou = "-" if row["ciou"] is None else f"{row['ciou']:.3f}"
        print(
            f"{row['mode']:<16}{row['parameters']:>14,}{row['trained']:>14,}{row['peak_mib']:>10.0f}{row['ms']:>9.1f}"
            f"{iou:>8}{row['steps']:>7}"
        )


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One mode."""
    torch.manual_seed(args.seed)
    sizes, device = SIZES[args.size], torch.device(args.device)
    steps = args.steps if args.size == "small" else 0
    config = config_of(args.mode, sizes)
    with torch.device("meta"):
        model = Bagel(config)
    # The small encoder starts from random values: kept as it is, it would see little. A published one is kept, as in LISA.
    freeze(model, ParamArgs(freeze_mask_encoder=args.size != "small"))
    fill_model(model, initial_values(config, args.seed), device)
    objective = Objective.build({"mask_bce": 1.0, "mask_dice": 1.0, "mask_iou": 1.0}, config.heads)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=args.lr, weight_decay=0.0
    )

    def batch(seed: int, count: int) -> PackedBatch:
        rng = np.random.default_rng([args.seed, seed])
        samples = [scene(rng, sizes["side"]) for _ in range(count)]
        return pack(samples, config.layout, SPECIAL).to(device)

    def step(seed: int, rate: float) -> None:
        given = batch(seed, sizes["batch"])
        flow = no_pictures(config, device)
        terms = objective.terms(model(given, flow.noised), given, flow)
        objective.scalar(terms, objective.counts(given)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = args.lr * rate
        optimizer.step()
        optimizer.zero_grad()

    peak = peak_of(lambda: step(0, 0.0), device)
    for number in range(1, steps + 1):
        step(number, min(1.0, number / 30) * (1 - number / (steps + 1)))
    parameters = list(model.parameters())
    return {
        "mode": args.mode, "size": args.size, "device": str(device), "steps": steps, "seed": args.seed,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "peak_mib": peak, "ms": latency(model, batch(-1 % 2**31, sizes["batch"]), config, device),
        "ciou": ciou(model, [batch(10**6 + i, 16) for i in range(8)], config, device) if steps else None,
    }  # fmt: skip


def config_of(mode: str, sizes: dict[str, Any]) -> BagelConfig:
    """A model without pictures to draw; in mode `sam` its tower is the encoder that `separate` has beside."""
    side, patch, encoder = sizes["side"], sizes["patch"], sizes["encoder"]
    tower: SiglipConfig | SamVisionConfig = SiglipConfig(**sizes["vit"], patch_size=patch, image_size=side)
    if mode == "sam":
        tower = SamVisionConfig.from_json(encoder, "encoder", strict=True)
    head = {"type": "sam", "vision_sharing": mode, "decoder": sizes["decoder"]}
    if mode == "separate":
        head["encoder"] = encoder
    llm = Qwen2Config(**sizes["llm"], num_key_value_heads=sizes["llm"]["num_attention_heads"], vocab_size=64)
    return BagelConfig(
        llm=llm, vit=tower, visual_gen=False, vit_max_num_patch_per_side=side // patch, heads={"mask": head}
    )


def scene(rng: np.random.Generator, side: int) -> Sample:
    """Up to four discs of different colours on noise; the question names a colour, the answer is its <SEG>."""
    pixels = rng.integers(0, 90, (side, side, 3)).astype(np.uint8)
    y, x = np.mgrid[:side, :side]
    colours = rng.permutation(len(COLOURS))[: int(rng.integers(2, 5))]
    masks = np.zeros((len(colours), side, side), bool)
    for i, colour in enumerate(colours):
        cx, cy, radius = *rng.uniform(0.15, 0.85, 2) * side, rng.uniform(0.08, 0.2) * side
        disc = (x - cx) ** 2 + (y - cy) ** 2 <= radius**2
        pixels[disc] = COLOURS[colour]
        masks[:i] &= ~disc
        masks[i] = disc
    seen = [i for i, mask in enumerate(masks) if mask.any()]
    picture = torch.from_numpy(pixels).permute(2, 0, 1)
    view = LongestSide(side)
    segments = [Segment(kind="und_image", pixels=picture, view=view(Image.fromarray(pixels)))]
    regions = []
    for branch, i in enumerate(seen, start=1):
        mask = torch.from_numpy(masks[i].astype(np.uint8))
        regions.append(Region(head="mask", segment=len(segments) + 1, token=0, image=0, mask=mask))
        question = torch.tensor([20 + int(colours[i])])
        segments += [
            Segment(kind="text", ids=question, branch=branch),
            Segment(kind="text", ids=torch.tensor([SPECIAL.anchors["mask"]]), supervised=True, branch=branch),
        ]
    return Sample(segments=tuple(segments), regions=tuple(regions))


def no_pictures(config: BagelConfig, device: torch.device) -> FlowState:
    """No latents: nothing is drawn."""
    none = torch.zeros(0, config.latent_token_width, device=device)
    return FlowState(latents=none, noise=none, noised=none)


def peak_of(run: Callable[[], None], device: torch.device) -> float:
    """MiB: on CUDA the most that was allocated, on a CPU the most the process had, weights and libraries among it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) / 2**20
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


@torch.no_grad()
def latency(model: Bagel, given: PackedBatch, config: BagelConfig, device: torch.device) -> float:
    """Median of 10 forward passes in ms, after 3 more."""
    model.eval()
    times = []
    for _ in range(13):
        _wait(device)
        began = time.perf_counter()
        model(given, no_pictures(config, device).noised)
        _wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def ciou(model: Bagel, packs: list[PackedBatch], config: BagelConfig, device: torch.device) -> float:
    """Sum of intersections over sum of unions."""
    both = either = 0
    for given in packs:
        found = model(given, no_pictures(config, device).noised).heads["mask"]
        sizes = [h * w for h, w in found.mask_hw]
        truth: tuple[Tensor, ...] = given.regions["mask"].mask_values.split(sizes)
        for logits, true in zip(found.mask_logits.split(sizes), truth, strict=True):
            inside, union = overlap_counts((logits > 0).cpu().numpy(), true.bool().cpu().numpy())
            both, either = both + inside, either + union
    return both / max(1, either)


if __name__ == "__main__":
    main()
