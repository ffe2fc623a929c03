"""Adapters against full training: how well the quickstart's model learns that colours have other names.

    python benchmarks/adapters.py --quickstart runs/quickstart --out runs/adapters

Takes a trained quickstart, gives every colour in questions, answers, captions and instructions the name of another (red is
called yellow, yellow green, green blue, blue red; the pictures stay), and goes on from the trained model in three ways with the
same packs: all weights, LoRA, and LoRA beside a base in 4 bits. Adapters are read by `--adapter`, as PEFT wrote them, and not
merged. Prints a JSON line: the quickstart's table on held-out scenes before and after each, in percent, how far each is from full
training at its worst figure, and the adapters' share of the parameters. One process; what is there already is not made again.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from safetensors import safe_open

ROOT = Path(__file__).resolve().parents[1]
RENAMED = {"red": "yellow", "yellow": "green", "green": "blue", "blue": "red"}
WORD = re.compile(rf"\b({'|'.join(RENAMED)})\b")
SPOKEN = ("message", "caption", "expressions")
"""Keys of records under which text stands that a model reads or writes."""
TABLE = ("vqa_exact", "generation_digit", "generation_colour", "edit_success", "box_acc_50", "mask_miou")
ADAPTERS: Mapping[str, Any] = {
    "lora_enable": True,
    "lora_target": "mot_und,mot_gen,vit",
    "lora_r": 4,
    "lora_alpha": 16,
    "lora_dropout": 0.0,
    "lr": 0.005,
}
# Full training has the quickstart's own rates.
RUNS: Mapping[str, Mapping[str, Any]] = {
    "full": {"lr": 0.001, **dict.fromkeys(("mot_gen_lr", "flow_lr", "box_lr", "mask_lr"), 0.003)},
    "lora": ADAPTERS,
    "qlora": {**ADAPTERS, "load_in_4bit": True},
}
COMMON: Mapping[str, Any] = {
    "config": ROOT / "configs" / "finetune.yaml",
    "dataset_config_file": ROOT / "configs" / "quickstart.yaml",
    "num_workers": 0,
    "save_every": 10**6,
    "log_every": 10,
    "warmup_steps": 20,
    "enable_tensorboard": False,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quickstart", type=Path, default=ROOT / "runs" / "quickstart")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "adapters")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--num_samples", type=int, default=-1, help="of each task at evaluation")
    args = parser.parse_args()
    model, data, out = args.quickstart / "results_dir" / "model", args.out / "data", args.out
    if not data.exists():
        draft = out / "data.tmp"
        shutil.rmtree(draft, ignore_errors=True)
        rename_colours(args.quickstart / "data", draft)
        draft.rename(data)
    tables = {"before": evaluate(model, data, out / "before", args.num_samples)}
    for name, flags in RUNS.items():
        results = out / name
        left = results / ("adapter" if flags.get("lora_enable") else "model")
        if not left.exists():
            train(model, data, results, {**flags, "total_steps": args.steps})
        which = {"adapter": left} if flags.get("lora_enable") else {}
        tables[name] = evaluate(
            model if which else left, data, results / "evaluation", args.num_samples, **which
        )
    full = tables["full"]
    print(
        json.dumps(
            {
                "steps": args.steps,
                "percent": tables,
                "worst_points_behind_full": {
                    name: round(max(full[k] - tables[name][k] for k in TABLE), 2)
                    for name in ("lora", "qlora")
                },
                "adapter_share_percent": round(
                    100
                    * numbers(out / "lora" / "adapter" / "ema" / "adapter_model.safetensors")
                    / numbers(model / "model.safetensors"),
                    2,
                ),
            }
        )
    )


def rename_colours(source: Path, target: Path) -> None:
    """Copy a quickstart's data with other names of colours; pictures are links."""
    target.mkdir(parents=True)
    for part in ("train", "val", "test"):
        (target / part).symlink_to((source / part).resolve())
    for file in sorted(source.iterdir()):
        if file.suffix == ".jsonl":
            lines = file.read_text(encoding="utf-8").splitlines()
            text = "".join(json.dumps(renamed(json.loads(line))) + "\n" for line in lines)
            (target / file.name).write_text(text, encoding="utf-8")
        elif file.suffix == ".json":
            (target / file.name).write_text(json.dumps(renamed(json.loads(file.read_text(encoding="utf-8")))))
        elif file.suffix == ".tar":
            _rename_members(file, target / file.name)


def renamed(value: Any, *, spoken: bool = False) -> Any:
    """A record with the colours in its texts renamed; what it says of the picture for scoring stays."""
    if isinstance(value, dict):
        return {key: renamed(x, spoken=spoken or key in SPOKEN) for key, x in value.items()}
    if isinstance(value, list):
        return [renamed(x, spoken=spoken) for x in value]
    if spoken and isinstance(value, str):
        return WORD.sub(lambda found: RENAMED[found[0]], value)
    return value


def _rename_members(source: Path, target: Path) -> None:
    with tarfile.open(source) as old, tarfile.open(target, "w") as new:
        for member in old:
            content = old.extractfile(member)
            assert content is not None, "shards hold files only"
            data = content.read()
            if member.name.endswith(".json"):
                data = json.dumps(renamed(json.loads(data))).encode()
                member.size = len(data)
            new.addfile(member, BytesIO(data))


def train(model: Path, data: Path, results: Path, flags: Mapping[str, Any]) -> None:
    words = {
        **COMMON,
        "model_path": model,
        "results_dir": results,
        "index_cache_dir": results / "index",
        **flags,
    }
    command = [sys.executable, str(ROOT / "train" / "main.py"), *(f"--{k}={v}" for k, v in words.items())]
    subprocess.run(command, check=True, env={**os.environ, "WEFT_DATA": str(data)}, stdout=sys.stderr)


def evaluate(model: Path, data: Path, out: Path, num_samples: int, **flags: Any) -> dict[str, float]:
    """The quickstart's table, in percent."""
    words = {"model_path": model, "data_dir": data, "output_dir": out, "num_samples": num_samples, **flags}
    sampling = "--timestep_shift 5 --cfg_text_scale 2 --cfg_interval 0.4 1.0 --edit_cfg_text_scale 1".split()
    command = [sys.executable, "-m", "inference_pipeline.evaluate", *(f"--{k}={v}" for k, v in words.items())]
    subprocess.run([*command, *sampling], check=True, cwd=ROOT, stdout=sys.stderr)
    found = json.loads((out / "statistics.json").read_text(encoding="utf-8"))
    return {name: round(100 * found[name], 2) for name in TABLE}


def numbers(file: Path) -> int:
    """How many numbers a file of weights holds."""
    with safe_open(file, framework="pt") as store:
        sizes = [store.get_slice(key).get_shape() for key in store.keys()]  # noqa: SIM118 - not a dict
    total = 0
    for size in sizes:
        count = 1
        for side in size:
            count *= side
        total += count
    return total


if __name__ == "__main__":
    main()
