"""What two choices bring on a CPU: channels-last convolutions in the VAE, and expert rows filled up to blocks.

    python benchmarks/cpu_step.py

Makes a small quickstart data set, then times, one thread each: encoding 48 pictures of 64 px in either memory format; and
forward and backward of the quickstart's model on packs of about 2,900 tokens that it has not met before, with the rows of each
expert filled up to a multiple of 128 or left as they fall, in either precision of the matrix products. Medians; each line is a
process of its own.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "8192")  # as train/distributed/session.py
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.layout import LayoutSpec
from data.mixture import build_groups, load_mixture
from data.policy import PackBudget
from data.stream import LaneStream, StreamPlan
from data.tokens import Tokenizer
from data.types import LaneCursor, PackedBatch
from modeling.autoencoder import load_autoencoder, save_autoencoder
from modeling.bagel.latents import LatentEncoder
from modeling.build import build_model, initial_values
from modeling.qwen2 import mot
from modeling.source import read_source
from scripts.data import make_quickstart, make_quickstart_model
from train import main_autoencoder
from train.args import LossArgs
from train.objective import Objective

PACKS = 24
CASES = (
    ("encode", "channels first"),
    ("encode", "channels last"),
    ("step", "medium 1"),
    ("step", "medium 128"),
    ("step", "highest 1"),
    ("step", "highest 128"),
)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--case", nargs=3, metavar=("WHAT", "HOW", "DIR"))
    args = parser.parse_args()
    if args.case:
        what, how, folder = args.case
        torch.set_num_threads(1)
        torch.set_flush_denormal(True)
        print({"encode": encode, "step": step}[what](how, Path(folder)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder))
        for what, how in CASES:
            command = [sys.executable, __file__, "--case", what, how, folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{what:<8}{how:<16}{done.stdout.strip().splitlines()[-1]}", flush=True)


def prepare(folder: Path) -> None:
    """Data, model directory and an untrained autoencoder."""
    make_quickstart.make(folder / "data", sizes={"train": 1500, "val": 1, "test": 1}, seed=0, workers=1)
    make_quickstart_model.make(folder / "data", folder / "base", 400)
    flags = ["--image_dir", str(folder), "--output_dir", str(folder / "base")]
    config = main_autoencoder.config_of(main_autoencoder.parse_args(flags))
    torch.manual_seed(0)
    save_autoencoder(main_autoencoder.AutoEncoder(config), folder / "base")


def encode(how: str, folder: Path) -> str:
    vae = load_autoencoder(folder / "base").eval().requires_grad_(False)
    if how == "channels last":
        vae = vae.to(memory_format=torch.channels_last)
    pixels = torch.rand(48, 3, 64, 64)
    vae.encode_moments(pixels)
    return f"{1000 * median(lambda _: vae.encode_moments(pixels), 9):.0f} ms"


def step(how: str, folder: Path) -> str:
    precision, block = how.split()
    torch.set_float32_matmul_precision(precision)
    mot.BLOCK = int(block)
    base = folder / "base"
    model = build_model(read_source(base).config)
    value = initial_values(model.config, 0)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(value(name, param.shape))
    encoder = LatentEncoder(load_autoencoder(base), model.config.latent_patch_size)
    objective = Objective.build(LossArgs().weights(), model.config.heads)
    packs = read_packs(folder)
    flows = [encoder(pack) for pack in packs]

    def once(i: int) -> None:
        terms = objective.terms(model(packs[i], flows[i].noised), packs[i], flows[i])
        objective.scalar(terms, objective.counts(packs[i])).backward()

    once(0)
    seconds = median(lambda i: once(i + 1), PACKS)
    tokens = statistics.mean(p.num_tokens for p in packs)
    return f"{1000 * seconds:.0f} ms a pack, {tokens / seconds / 1000:.1f}k tokens/s"


def read_packs(folder: Path) -> list[PackedBatch]:
    os.environ["WEFT_DATA"] = str(folder / "data")
    tokenizer = Tokenizer(folder / "base")
    plan = StreamPlan(
        groups=build_groups(load_mixture(ROOT / "configs" / "quickstart.yaml"), tokenizer),
        layout=LayoutSpec.from_model_dir(folder / "base"),
        special=tokenizer.special,
        budget=PackBudget(expected=2900, maximum=3200, per_sample=1000, max_buffer=50),
        seed=0,
    )
    stream = LaneStream(plan, LaneCursor(lane=0))
    return [stream.next_pack() for _ in range(PACKS + 1)]


def median(do, times: int) -> float:
    seconds = []
    for i in range(times):
        started = time.perf_counter()
        do(i)
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
