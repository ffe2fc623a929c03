"""What an index costs: building it, opening it, and the memory of a worker that reads through it.

    python benchmarks/data_index.py                      # 1,000,000 rows; --rows 10000000 takes 1.3 GB of disk

Writes a JSONL of short question-and-answer rows, builds its index, then starts the loader with one worker twice, each time in
a process of its own: on ten rows and on all. `first_batch_s` counts from the start of that process to the first pack, with the
index there already; memory is that of the worker after `--packs` packs: what is resident, and what of it is its own. Prints one
JSON line.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--packs", type=int, default=50)
    parser.add_argument("--dir", type=Path, help="keep the data here, and use what is there")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # what the processes are called with
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.packs)), flush=True)
        return
    with tempfile.TemporaryDirectory() as folder:
        base = args.dir or Path(folder)
        base.mkdir(parents=True, exist_ok=True)
        print(json.dumps(compare(base, args.rows, args.packs)), flush=True)


def compare(base: Path, rows: int, packs: int) -> dict[str, object]:
    """Every figure."""
    files = {count: base / f"{count}.jsonl" for count in (10, rows)}
    for count, file in files.items():
        if not file.exists():
            write_rows(file, count)
    build_s = index_seconds(files[rows])
    index_seconds(files[10])
    again_s = index_seconds(files[rows])
    found = {}
    for count, file in files.items():
        started = time.time()
        command = [sys.executable, __file__, "--measure", str(file), "--packs", str(packs)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        found[count] = json.loads(done.stdout.splitlines()[-1])
        found[count]["first_batch_s"] = round(found[count].pop("first_batch_at") - started, 2)
    index = files[rows].with_name(files[rows].name + ".index.safetensors")
    return {
        "rows": rows,
        "data_mib": round(files[rows].stat().st_size / MIB, 1),
        "index_bytes_per_row": round(index.stat().st_size / rows, 2),
        "build_s": round(build_s, 2),
        "open_s": round(again_s, 3),
        "ten_rows": found[10],
        "all_rows": found[rows],
        "worker_growth_mib": round(found[rows]["worker_mib"] - found[10]["worker_mib"], 1),
        "worker_own_growth_mib": round(found[rows]["worker_own_mib"] - found[10]["worker_own_mib"], 1),
    }


def write_rows(file: Path, count: int) -> None:
    with file.open("w", encoding="utf-8") as out:
        for first in range(0, count, 10_000):
            out.writelines(
                f'{{"message": [{{"from": "human", "value": "{i} + 1 = ?"}}, {{"from": "gpt", "value": "{i + 1}"}}]}}\n'
                for i in range(first, min(first + 10_000, count))
            )


def index_seconds(file: Path) -> float:
    """From a data set's path to its open index."""
    from data.sources import JsonlSource

    started = time.perf_counter()
    JsonlSource(file)
    return time.perf_counter() - started


def measure(file: Path, packs: int) -> dict[str, float]:
    """In a process of its own: start the loader as the trainer does, read, look at the worker's memory."""
    from data.layout import LayoutSpec
    from data.loader import build_loader
    from data.mixture import build_groups, load_mixture
    from data.policy import PackBudget
    from data.stream import StreamPlan

    with tempfile.TemporaryDirectory() as folder:
        tokenizer = byte_tokenizer(Path(folder))
        mixture = Path(folder) / "mixture.yaml"
        location = json.dumps({"text_only": {"rows": {"jsonl_path": str(file)}}})
        mixture.write_text(f"dataset_info: {location}\ntext_only:\n  dataset_names: [rows]\n")
        plan = StreamPlan(
            groups=build_groups(load_mixture(mixture), tokenizer),
            layout=LayoutSpec(vit_patch_size=14, latent_stride=16),
            special=tokenizer.special,
            budget=PackBudget(expected=32768, maximum=36864, per_sample=16384),
            seed=0,
        )
        batches = build_loader(plan, num_workers=1)
        next(batches)
        at = time.time()
        for _ in range(packs - 1):
            next(batches)
        (worker,) = (p.pid for p in multiprocessing.active_children())
        return {"first_batch_at": at, **memory(worker)}


def memory(pid: int) -> dict[str, float]:
    """Resident MiB of a process, and what of it no other process or file shares."""
    kib: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value, _ = line.split()
        kib[name.rstrip(":")] = int(value)
    own = kib["Private_Dirty"] + kib["Private_Clean"]
    return {"worker_mib": round(kib["Rss"] / 1024, 1), "worker_own_mib": round(own / 1024, 1)}


def byte_tokenizer(folder: Path):
    """One token per byte: its size does not hide what is measured."""
    from tokenizers import AddedToken, models, pre_tokenizers
    from tokenizers import Tokenizer as BpeTokenizer

    from data.tokens import SPECIAL_TOKENS, Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = BpeTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    bpe.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder / "tokenizer.json")


if __name__ == "__main__":
    main()
