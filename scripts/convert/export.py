"""A training checkpoint -> a model directory in the published layout, for inference, other runs and the published programs.

In: a step's directory (`RUN/checkpoints/0002400`), or a model directory, to give it another precision or other shards. Out: `OUT`
with weights, configurations, tokenizer, autoencoder and `manifest.json` (source run, step, code version, SHA-256 of every file).
One process, one tensor in memory at a time; `OUT` appears when it is complete. With `--merge`, in: a run's adapters, a step that
holds some, or any PEFT directory; they are added up with the weights that they were trained on.

    python -m scripts.convert.export runs/quickstart/checkpoints/0002400 runs/quickstart/exported
    python -m scripts.convert.export runs/lora/adapter runs/lora/exported --merge
"""

import argparse
import json
import logging
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from modeling.adapters import find_adapter, open_adapter
from modeling.bagel.init import fixed_tables
from modeling.build import build_model, open_kind, parameter_shapes, require_complete, weights_kind
from modeling.huggingface import EMBEDDINGS
from modeling.source import TABLES, ModelSource, read_source
from modeling.tensor_file import Entry, plan_files
from modeling.weights import Weights, find_weights, open_weights
from train.args import ModelArgs
from train.checkpoint import ARGS, TENSORS, complete_steps, require_intact
from train.distributed.dcp import StoredTensors
from train.export import (
    ModelDirectory,
    beyond_published,
    read_origin,
    require_replaceable,
    tied_names,
    write_model_directory,
)
from train.source import model_source

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Read the command line, export, say what was written; a mistake ends in one line and exit code 1."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        export(args)
    except ValueError as error:
        sys.exit(f"error: {error}")


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m scripts.convert.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source", type=Path, metavar="RUN/STEP", help="a step's directory, or a model directory"
    )
    parser.add_argument(
        "target", type=Path, metavar="OUT", help="new model directory; an earlier export is replaced"
    )
    parser.add_argument(
        "--weights",
        choices=("ema", "model"),
        help="averaged or last weights [ema, or what a model directory has]",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="precision of the weights [as stored]")
    parser.add_argument("--shard_size", type=size, metavar="5GB", help="bytes of weights per file [one file]")
    parser.add_argument(
        "--model_path",
        help="where the run's model files are now, if they are not where they were when the run started",
    )
    parser.add_argument(
        "--merge", action="store_true", help="the source holds adapters: add them to their base"
    )
    return parser.parse_args(argv)


def size(text: str) -> int:
    """`5GB` -> 5,000,000,000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    if not found or found[2].upper() not in UNITS or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB, 500MB or 2GiB")
    return int(float(found[1]) * UNITS[found[2].upper()])


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What is exported.

    Attributes:
        source: the model and its files.
        kind: of its weights, `ema` or `model`.
        origin: where they come from, for the manifest.
        store: the weights by name.
        tables: the position tables that the store does not have.
    """

    source: ModelSource
    kind: str
    origin: Mapping[str, Any]
    store: Weights
    tables: Mapping[str, Tensor]


def export(args: argparse.Namespace) -> None:
    """Find out what the source is, check that it is whole, write.

    Raises:
        ValueError: naming the directory, file or flag that is wrong.
    """
    if args.source.resolve() == args.target.resolve():
        raise ValueError(f"{args.target}: is what is exported; choose another place for the export")
    require_replaceable(args.target)
    opened = opener(args)(args)
    model = build_model(opened.source.config)
    require_complete(opened.store, parameter_shapes(model))
    kept, default = tied_names(model), opened.store.dtypes[EMBEDDINGS]

    def entry(name: str, shape: torch.Size) -> Entry:
        dtype = opened.store.dtypes.get(kept.get(name, name), default)
        return Entry(shape=tuple(shape), dtype=DTYPES[args.dtype] if args.dtype else dtype)

    def read(_: str, name: str) -> Tensor:
        return opened.tables[name] if name in opened.tables else opened.store.read(kept.get(name, name))

    entries = {name: entry(name, x.shape) for name, x in model.state_dict().items()}
    plan = plan_files(opened.kind, entries, args.shard_size)
    write_model_directory(
        ModelDirectory(
            target=args.target, source=opened.source, origin=opened.origin, plans={opened.kind: plan}
        ),
        read,
    )
    logger.info("%s: %d tensors in %d files, %.3f GB", args.target, len(entries), len(plan),
                sum(part.num_bytes for part in plan) / 1e9)  # fmt: skip
    if notes := beyond_published(opened.source.config):
        logger.info("%s: has what the published programs do not: %s", args.target, ", ".join(notes))


def opener(args: argparse.Namespace) -> Callable[[argparse.Namespace], Opened]:
    """What reads a source like this one.

    Raises:
        ValueError: if it holds adapters and is not to be merged, or the other way round.
    """
    try:
        adapter = find_adapter(args.source, args.weights or "ema")
    except ValueError:
        adapter = None
    if adapter is not None and not args.merge:
        raise ValueError(
            f"{args.source}: holds adapters ({adapter}), not a whole model; add --merge to write their base with them in it"
        )
    if args.merge:
        return open_merged
    return open_model_directory if is_model_directory(args.source) else open_step


def is_model_directory(path: Path) -> bool:
    return (path / "llm_config.json").is_file()


def open_step(args: argparse.Namespace) -> Opened:
    """A step of a run: its tensors, and the model files that its flags name."""
    step, kind = args.source, args.weights or "ema"
    _require_step(step)
    require_intact(step)  # before anything in it is read
    flags = json.loads((step / ARGS).read_text(encoding="utf-8"))
    known = {f.name: flags[f.name] for f in fields(ModelArgs) if f.name in flags}
    moved: dict[str, str | None] = {}
    if args.model_path is not None:  # it also stands in for what the run was built from, where that is gone
        gone = [
            name
            for name in ("llm_path", "vit_path", "mask_path", "vae_path")
            if known.get(name) and not Path(known[name]).exists()
        ]
        moved = {"model_path": args.model_path, **dict.fromkeys(gone)}
    try:
        source = model_source(ModelArgs(**{**known, **moved}))
    except ValueError as error:
        raise ValueError(
            f"{error}; the run's model files are needed: go to where the run was started, or name a model directory that has "
            "them (--model_path)"
        ) from error
    tensors = StoredTensors(step / TENSORS)
    places = {n.removeprefix("model."): n for n in tensors.shapes if n.startswith("model.")}
    if kind == "ema":  # what was not trained has no average
        places |= {n.removeprefix("ema."): n for n in tensors.shapes if n.startswith("ema.")}
    store = Weights(
        name=step,
        shapes={name: tensors.shapes[n] for name, n in places.items() if name not in TABLES},
        dtypes={name: tensors.dtypes[n] for name, n in places.items()},
        tables={name: tensors.shapes[n] for name, n in places.items() if name in TABLES},
        _read=lambda name: tensors.read(places[name]),
    )
    origin = {"run": flags.get("results_dir", step.parent.name), "step": int(step.name)}
    return Opened(source=source, kind=kind, origin=origin, store=store, tables={})


def open_model_directory(args: argparse.Namespace) -> Opened:
    """A model directory with weights: ours or a published one."""
    if args.model_path is not None:
        raise ValueError(
            f"--model_path {args.model_path}: {args.source} is a model directory, which has files of its own"
        )
    kind = args.weights or weights_kind(args.source, prefer_ema=True)
    file = find_weights(args.source, kind)
    if file is None:
        raise ValueError(f"{args.source}: has no weights of the kind `{kind}` ({kind}.safetensors)")
    source, store = read_source(args.source), open_weights(file)
    tables = _tables(source, store)
    return Opened(source=source, kind=kind, origin=read_origin(args.source), store=store, tables=tables)


def open_merged(args: argparse.Namespace) -> Opened:
    """Adapters, and the model directory that they are a difference to."""
    kind = args.weights or "ema"
    adapter = open_adapter(args.source, kind)
    if adapter.folder.parent.parent == args.source:  # of a step, which may be damaged
        require_intact(args.source)
    base = args.model_path or adapter.record.get("base", {}).get("path")
    if base is None or not is_model_directory(Path(base)):
        said = f"their base {base} is not there" if base else "they do not say what they were trained on"
        raise ValueError(f"{args.source}: {said}; name the model directory with --model_path")
    weights = adapter.base_weights(base, weights_kind(base, prefer_ema=kind == "ema"))
    source, store = read_source(base), open_kind(base, weights)
    adapter.require_fits(parameter_shapes(build_model(source.config)))
    origin = {key: adapter.record[key] for key in ("run", "step", "base") if key in adapter.record}
    return Opened(
        source=source,
        kind=kind,
        origin={"adapter": str(args.source), **origin},
        store=replace(store, _read=lambda name: adapter.apply(name, store.read(name))),
        tables=_tables(source, store),
    )


def _tables(source: ModelSource, store: Weights) -> dict[str, Tensor]:
    """The position tables of a model: stored ones, where they are of its size."""
    return {
        name: store.read(name) if store.tables.get(name) == tuple(table.shape) else table
        for name, table in fixed_tables(source.config).items()
    }


def _require_step(path: Path) -> None:
    """Say which steps there are where the one named is not."""
    steps = complete_steps(path.parent)
    if path in steps:
        return
    if inner := complete_steps(path) or complete_steps(path / "checkpoints"):
        raise ValueError(f"{path}: is a directory of steps; name one of them, such as {inner[-1]}")
    problem = "is not a complete checkpoint" if path.is_dir() else "there is no such directory"
    others = (
        f"complete steps there: {', '.join(step.name for step in steps)}"
        if steps
        else "no complete step is there either"
    )
    raise ValueError(f"{path}: {problem}; {others}")


if __name__ == "__main__":
    main()
