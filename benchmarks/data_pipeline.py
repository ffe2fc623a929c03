"""How fast pictures and texts become packs, against plain WebDataset and against the published pipeline.

    python benchmarks/data_pipeline.py                   # 3 GB of disk, 10 minutes of two free cores
    python benchmarks/data_pipeline.py --files 200

Makes 2,000 pictures of 512 px and 500 of 1,500 px, each of which takes eight times as long (one in ten a PNG, the others JPEG
of quality 90; noise with the spectrum of photographs under rectangles with hard edges), a question and an answer to each, and
the same as a tar for WebDataset. Each system then reads them with one worker process, as for a trainer, one thread a process:

- `weft`: this repository's loader (vlm_sft, budget 32768 / 36864 / 16384);
- `webdataset`: WebDataset, Pillow, the same resize, float pixels in [-1, 1], the same tokens by the same tokenizer. It gives
  single samples without patches, positions and packs, so it does less;
- `published dense`: upstream's loader restated from the facts that are kept of it: Pillow, float pixels, float patches, a
  tokenizer in Python, lists of positions, a float mask of length x length per sample, tensors through torch's shared memory (2
  GB of /dev/shm); `published flex`: the same without masks.

A round lets each in turn deliver its share of the files. What counts is CPU time, of worker and trainer together, from one moment
at which the worker has filled its queue to the next; ratios are medians of those of the rounds. Pixels are compared over some
files. Exits with 1 if a target is missed.
"""

import argparse
import io
import json
import math
import multiprocessing
import os
import statistics
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
from pydoc_data.topics import topics

import numpy as np
import regex
import torch
from PIL import Image, ImageDraw
from tokenizers import AddedToken, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from data.layout import LayoutSpec
from data.loader import build_loader
from data.mixture import build_groups, load_mixture
from data.policy import PackBudget
from data.rgb_image import to_rgb
from data.sources.record import decode_image
from data.stream import StreamPlan
from data.tokens import SPECIAL_TOKENS, Tokenizer
from data.transforms import ImageTransform
from data.transport import Slots
from data.types import PackedBatch

FILES = {512: 2000, 1500: 500}
"""Longer side in px -> how many pictures."""

LIMITS = {"max_image_size": 980, "min_image_size": 378, "stride": 14, "max_pixels": 2_007_040}
TRANSFORM = ImageTransform(**LIMITS)
PATCH = 14
EXPECTED, MAXIMUM, PER_SAMPLE = 32768, 36864, 16384
COMPARED = 40
"""Files of each size whose pixels are compared."""

TARGETS = {"webdataset": 2.4, "published flex": 3.0, "published dense": 4.0}
BYTES_TARGET = 10.0


# ------------------------------------------------------------------------------------------------- the data


def noise(rng: np.random.Generator, side: int = 3072) -> np.ndarray:
    """`side side 3` uint8 whose amplitudes fall as 1 / frequency, as those of photographs do."""
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    waves = [rng.standard_normal((*frequency.shape, 2)).view(complex)[..., 0] / frequency for _ in range(4)]
    grey, *colours = (field / field.std() for field in map(np.fft.irfft2, waves))
    return np.stack([128 + 50 * (grey + 0.4 * c) for c in colours], -1).clip(0, 255).astype(np.uint8)


def draw(rng: np.random.Generator, ground: np.ndarray, side: int) -> Image.Image:
    """A picture whose longer side has `side` px."""
    short = round(side * math.exp(-abs(rng.normal(0, 0.25))))
    width, height = (side, short) if rng.random() < 0.5 else (short, side)
    x, y = rng.integers(len(ground) - width), rng.integers(len(ground) - height)
    picture = Image.fromarray(ground[y : y + height, x : x + width])
    pen = ImageDraw.Draw(picture)
    for _ in range(8):
        (x0, x1), (y0, y1) = (
            sorted(rng.integers(0, width, 2).tolist()),
            sorted(rng.integers(0, height, 2).tolist()),
        )
        colour = tuple(rng.choice([0, 40, 200, 255], 3).tolist())
        pen.rectangle((x0, y0, x1, y1), outline=colour, width=3, fill=colour if rng.random() < 0.3 else None)
    return picture


def make_data(folder: Path, side: int, files: int) -> None:
    """`pictures/`, `rows.jsonl` and `shard.tar` in the folder."""
    rng = np.random.default_rng(side)
    grounds = [noise(rng) for _ in range(2)]
    words = " ".join(topics.values()).split()
    (folder / "pictures").mkdir(parents=True)
    with (
        (folder / "rows.jsonl").open("w", encoding="utf-8") as rows,
        tarfile.open(folder / "shard.tar", "w") as tar,
    ):
        for i in range(files):
            name = f"{i:05}.{'png' if i % 10 == 9 else 'jpg'}"
            file = io.BytesIO()
            picture = draw(rng, grounds[i % len(grounds)], side)
            picture.save(file, "PNG" if name.endswith("png") else "JPEG", quality=90)
            (folder / "pictures" / name).write_bytes(file.getvalue())
            question, answer = (some_words(rng, words, median) for median in (25, 90))
            turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
            row = json.dumps({"image": name, "conversations": turns})
            rows.write(row + "\n")
            for member, content in ((name, file.getvalue()), (f"{i:05}.json", row.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))


def some_words(rng: np.random.Generator, words: Sequence[str], median: float) -> str:
    count = int(min(400, max(3, rng.lognormal(math.log(median), 0.7))))
    start = int(rng.integers(len(words) - count))
    return " ".join(words[start : start + count])


def make_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 16,000 tokens, trained on Python's own help texts."""
    bpe = BpeTokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        topics.values(),
        trainers.BpeTrainer(vocab_size=16_000, initial_alphabet=alphabet, show_progress=False),
    )
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bpe.save(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------------------------ the systems


def weft(folder: Path) -> Iterator[PackedBatch]:
    tokenizer = Tokenizer(folder.parent)
    where = {"jsonl_path": str(folder / "rows.jsonl"), "data_dir": str(folder / "pictures")}
    group = {"dataset_names": ["pictures"], "image_transform_args": LIMITS}
    mixture = folder / "mixture.yaml"
    mixture.write_text(json.dumps({"dataset_info": {"vlm_sft": {"pictures": where}}, "vlm_sft": group}))
    plan = StreamPlan(
        groups=build_groups(load_mixture(mixture), tokenizer),
        layout=LayoutSpec(vit_patch_size=PATCH, latent_stride=16),
        special=tokenizer.special,
        budget=PackBudget(expected=EXPECTED, maximum=MAXIMUM, per_sample=PER_SAMPLE),
        seed=0,
        num_lanes=1,  # a worker of a real run has one or two
    )
    return build_loader(plan, num_workers=1)


class Prepare:
    """What WebDataset's samples go through."""

    def __init__(self, tokenizer: Path):
        self.path = tokenizer

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
        self.tokenizer = getattr(self, "tokenizer", None) or BpeTokenizer.from_file(str(self.path))
        picture = sample["jpg"] if "jpg" in sample else sample["png"]
        texts = [turn["value"].removeprefix("<image>\n") for turn in sample["json"]["conversations"]]
        return float_pixels(picture), [torch.tensor(self.tokenizer.encode(text).ids) for text in texts]


def float_pixels(picture: Image.Image) -> Tensor:
    """`3 hh ww` float32 in [-1, 1], as both others make them."""
    rgb = to_rgb(picture)
    rgb = rgb.resize(TRANSFORM.resized(*rgb.size), Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(rgb)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(0.5).div_(0.5)


def webdataset(folder: Path) -> Iterator[tuple[Tensor, list[Tensor]]]:
    import webdataset as wds

    samples = wds.WebDataset(str(folder / "shard.tar"), shardshuffle=False).repeat().decode("pil")
    return iter(
        wds.WebLoader(
            samples.map(Prepare(folder.parent / "tokenizer.json")),
            batch_size=None,
            num_workers=1,
            multiprocessing_context="fork",
        )
    )


class PythonTokenizer:
    """Byte-level BPE, word by word in Python with the words it knows kept, as `transformers` 4 does it for Qwen2."""

    def __init__(self, file: Path):
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        self.ids: dict[str, int] = model["vocab"]
        self.ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        self.words = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
        shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [byte for byte in range(256) if byte not in shown]
        self.letter = {byte: chr(byte) for byte in shown} | {
            byte: chr(256 + i) for i, byte in enumerate(hidden)
        }
        self.known: dict[str, list[str]] = {}

    def encode(self, text: str) -> list[int]:
        tokens: list[str] = []
        for word in self.words.findall(text):
            tokens.extend(self._tokens("".join(self.letter[byte] for byte in word.encode())))
        return [self.ids[token] for token in tokens]

    def _tokens(self, word: str) -> list[str]:
        if word in self.known:
            return self.known[word]
        parts = list(word)
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:], strict=False))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, math.inf))
            if best not in self.ranks:
                break
            joined, i = [], 0
            while i < len(parts):
                both = i + 1 < len(parts) and (parts[i], parts[i + 1]) == best
                joined.append(parts[i] + parts[i + 1] if both else parts[i])
                i += 2 if both else 1
            parts = joined
        self.known[word] = parts
        return parts


@dataclass
class PublishedSample:
    pixels: Tensor
    texts: tuple[list[int], list[int]]

    @property
    def tokens(self) -> int:
        _, height, width = self.pixels.shape
        return (height // PATCH) * (width // PATCH) + 2 + sum(len(ids) + 2 for ids in self.texts)


class Published(IterableDataset[dict[str, Any]]):
    """Upstream's loader for questions about pictures, restated from facts (shapes, order of work, when a pack is full)."""

    def __init__(self, folder: Path, dense: bool):
        self.folder, self.dense = folder, dense

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.tokenizer = PythonTokenizer(self.folder.parent / "tokenizer.json")
        self.special = Tokenizer(self.folder.parent).special
        samples = self.samples()
        waiting: list[PublishedSample] = []
        while True:
            pack: list[PublishedSample] = []
            used = 0
            while used < EXPECTED:
                fresh = used >= 16384 or not waiting
                sample = next(samples) if fresh else waiting.pop(0)
                cost = sample.tokens + 2 * 3  # and two for each of its three parts
                if cost > PER_SAMPLE:
                    continue
                if used + cost > MAXIMUM:
                    if fresh and len(waiting) < 50:
                        waiting.append(sample)
                        continue
                    break  # the sample is lost
                pack.append(sample)
                used += sample.tokens
            yield self.packed(pack)

    def samples(self) -> Iterator[PublishedSample]:
        rows = (self.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()
        while True:
            for line in rows:
                row = json.loads(line)
                picture = Image.open(self.folder / "pictures" / row["image"])
                question, answer = (turn["value"].removeprefix("<image>\n") for turn in row["conversations"])
                texts = self.tokenizer.encode(question), self.tokenizer.encode(answer)
                yield PublishedSample(float_pixels(picture), texts)

    def packed(self, samples: Sequence[PublishedSample]) -> dict[str, Any]:
        special, at = self.special, 0
        text_ids: list[int] = []
        text_at: list[int] = []
        patches_at: list[int] = []
        positions: list[int] = []
        label_ids: list[int] = []
        label_at: list[int] = []
        label_weights: list[float] = []
        patches, patch_positions, lengths, splits, modes, masks = [], [], [], [], [], []
        for sample in samples:
            start, position = at, 0
            _, height, width = sample.pixels.shape
            rows, columns = height // PATCH, width // PATCH
            grid = sample.pixels.reshape(3, rows, PATCH, columns, PATCH)
            patches.append(torch.einsum("cipjq->ijpqc", grid).reshape(-1, PATCH * PATCH * 3))
            patch_positions.append((torch.arange(rows)[:, None] * 70 + torch.arange(columns)).flatten())
            count = rows * columns
            text_ids += [special.image_start, special.image_end]
            text_at += [at, at + count + 1]
            patches_at.extend(range(at + 1, at + 1 + count))
            positions.extend([position] * (count + 2))
            own_splits, own_modes = [count + 2], ["full"]
            at, position = at + count + 2, position + 1
            for ids, learnt in zip(sample.texts, (False, True), strict=True):
                framed = [special.begin, *ids, special.end]
                text_ids.extend(framed)
                text_at.extend(range(at, at + len(framed)))
                positions.extend(range(position, position + len(framed)))
                if learnt:
                    label_ids.extend(framed[1:])
                    label_at.extend(range(at, at + len(framed) - 1))
                    label_weights.extend([(len(framed) - 1) ** -0.5] * (len(framed) - 1))
                own_splits.append(len(framed))
                own_modes.append("causal")
                at, position = at + len(framed), position + len(framed)
            lengths.append(at - start)
            splits += own_splits
            modes += own_modes
            if self.dense:
                masks.append(dense_mask(own_splits, own_modes))
        batch: dict[str, Any] = {
            "sequence_length": at,
            "packed_text_ids": torch.tensor(text_ids),
            "packed_text_indexes": torch.tensor(text_at),
            "packed_position_ids": torch.tensor(positions),
            "packed_label_ids": torch.tensor(label_ids),
            "ce_loss_indexes": torch.tensor(label_at),
            "ce_loss_weights": torch.tensor(label_weights),
            "packed_vit_tokens": torch.cat(patches),
            "packed_vit_position_ids": torch.cat(patch_positions),
            "packed_vit_token_indexes": torch.tensor(patches_at),
            "vit_token_seqlens": torch.tensor([len(p) for p in patches]),
        }
        if self.dense:
            return {**batch, "sample_lens": lengths, "nested_attention_masks": masks}
        return {**batch, "sample_lens": [*lengths, MAXIMUM - at], "split_lens": splits, "attn_modes": modes}


def dense_mask(splits: Sequence[int], modes: Sequence[str]) -> Tensor:
    """`n n` float32: 0 where a token of the sample sees another, else -inf."""
    total, at = sum(splits), 0
    seen = torch.zeros(total, total, dtype=torch.bool)
    for length, mode in zip(splits, modes, strict=True):
        end = at + length
        own = torch.ones(length, length, dtype=torch.bool)
        seen[at:end, :at] = True
        seen[at:end, at:end] = own.tril() if mode == "causal" else own
        at = end
    return torch.zeros(total, total).masked_fill_(~seen, -math.inf)


def first(items: list[Any]) -> Any:
    return items[0]


def published(folder: Path, dense: bool) -> Iterator[dict[str, Any]]:
    loader = DataLoader(
        Published(folder, dense),
        batch_size=1,
        collate_fn=first,
        num_workers=1,
        multiprocessing_context="fork",
    )
    return iter(loader)


# ------------------------------------------------------------------------------------------------ measuring


@dataclass(frozen=True)
class System:
    """A pipeline, how many samples lie in what it delivers, and how many bytes that takes on its way."""

    start: Callable[[Path], Iterator[Any]]
    samples: Callable[[Any], int]
    bytes: Callable[[Any], int]


def tensor_bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return sum(map(tensor_bytes, parts))


SYSTEMS = {
    "weft": System(weft, lambda pack: len(pack.origins), lambda pack: Slots(1).put(pack).num_bytes),
    "webdataset": System(webdataset, lambda sample: 1, tensor_bytes),
    "published flex": System(
        lambda f: published(f, False), lambda b: len(b["vit_token_seqlens"]), tensor_bytes
    ),
    "published dense": System(
        lambda f: published(f, True), lambda b: len(b["vit_token_seqlens"]), tensor_bytes
    ),
}


class Running:
    """A system with its worker process."""

    def __init__(self, system: System, folder: Path):
        self.system = system
        before = set(multiprocessing.active_children())
        self.items = system.start(folder)
        self.delivered: Any = next(self.items)
        (worker,) = set(multiprocessing.active_children()) - before
        assert worker.pid is not None
        self.pid = worker.pid
        self.settle()

    def settle(self) -> None:
        """Wait until the worker has filled its queue."""
        quiet = 0
        while quiet < 3:
            before = cpu_seconds(self.pid)
            time.sleep(0.2)
            quiet = quiet + 1 if cpu_seconds(self.pid) == before else 0

    def round(self, samples: int) -> float:
        """CPU seconds a sample."""
        started, worker = time.process_time(), cpu_seconds(self.pid)
        done = 0
        while done < samples:
            self.delivered = next(self.items)
            done += self.system.samples(self.delivered)
        trainer = time.process_time() - started
        self.settle()
        return (trainer + cpu_seconds(self.pid) - worker) / done

    @property
    def bytes(self) -> int:
        return self.system.bytes(self.delivered)


def cpu_seconds(pid: int) -> float:
    """User and system time of a process, all its threads."""
    after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def pixel_differences(folder: Path) -> tuple[int, float]:
    """Largest and mean difference of 255 levels between our pixels and those of the published transform."""
    worst, mean = 0, []
    for file in sorted((folder / "pictures").iterdir())[:COMPARED]:
        ours = TRANSFORM(decode_image(file.read_bytes())).int()
        theirs = (float_pixels(Image.open(file)).double() * 127.5 + 127.5).round().int()
        difference = (ours - theirs).abs()
        worst = max(worst, int(difference.max()))
        mean.append(float(difference.double().mean()))
    return worst, statistics.mean(mean)


def require_same_tokens(folder: Path) -> None:
    """The tokenizers that are compared have to give the same tokens."""
    slow, fast = PythonTokenizer(folder.parent / "tokenizer.json"), Tokenizer(folder.parent)
    for line in (folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()[:COMPARED]:
        for turn in json.loads(line)["conversations"]:
            text = turn["value"].removeprefix("<image>\n")
            assert slow.encode(text) == fast.encode(text).tolist(), text


def measure(folder: Path, files: int, rounds: int) -> bool:
    """Print the figures of one size; whether all targets are met."""
    require_same_tokens(folder)
    worst, mean = pixel_differences(folder)
    running = {name: Running(system, folder) for name, system in SYSTEMS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in running}
    names = list(running)
    for i in range(rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            seconds[name].append(running[name].round(-(-files // rounds)))
    sizes = {name: one.bytes for name, one in running.items()}
    for name in names:
        what = "MB a sample" if name == "webdataset" else "MB a pack"
        rate = 1 / statistics.median(seconds[name])
        print(f"  {name:<16}{rate:8.1f} samples/s/core {sizes[name] / 1e6:8.1f} {what}", flush=True)
    good = worst <= 1
    print(f"  pixels: at most {worst} of 255 levels apart (target 1), {mean:.5f} on average")
    for name, target in TARGETS.items():
        ratios = [theirs / ours for theirs, ours in zip(seconds[name], seconds["weft"], strict=True)]
        ratio = statistics.median(ratios)
        good &= ratio >= target
        span = f"{min(ratios):.2f} ... {max(ratios):.2f}"
        print(f"  {ratio:.2f} x {name} (target {target}; rounds {span})")
    fewer, fewer_than_flex = (sizes[name] / sizes["weft"] for name in ("published dense", "published flex"))
    good &= fewer >= BYTES_TARGET
    print(
        f"  bytes a pack: 1/{fewer:.1f} of published dense (target 1/{BYTES_TARGET:.0f}), "
        f"1/{fewer_than_flex:.1f} of published flex"
    )
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, help="of each size")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sides",
        type=int,
        nargs="+",
        default=list(FILES),
        choices=list(FILES),
        help="of the pictures, in px",
    )
    parser.add_argument("--dir", type=Path, help="make the files in this directory, and leave them there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    good = True
    with tempfile.TemporaryDirectory() as scratch:
        base = args.dir or Path(scratch)
        base.mkdir(parents=True, exist_ok=True)
        make_tokenizer(base)
        for side in args.sides:
            files = args.files or FILES[side]
            folder = base / f"{side}px-{files}"
            if not folder.exists():
                make_data(folder, side, files)
            print(f"{files} files of {side} px, {args.rounds} rounds", flush=True)
            good &= measure(folder, files, args.rounds)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
