"""Boxes and masks of held-out data against the truth: RefCOCO-, ReasonSeg-, COCO- and Shikra-style groups of a mixture YAML.

    python -m inference_pipeline.evaluate_grounding --model_path MODEL --dataset_config_file data.yaml --mode generate \
        --output_dir OUT --name epoch_3

In `forced` mode the model is made to say the answer with its `<BOX>` or `<SEG>`, as the published figures of reasoning
segmentation were made; in `generate` mode it has to say so itself, or it has pointed at nothing. The figures are called
`forced/…` and `generated/…`: they are not comparable.

Out, under --output_dir: `NAME/MODE/results.jsonl` (a row per question, with its share of every sum), `NAME_MODE.json` (figures by
group), and an entry in `training_history.json`. Several processes take turns with the questions (--shard, --num_shards), none is
asked twice; `--merge` combines them. Started again after a kill it goes on where it stopped.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.box_text import BoxText
from data.mixture import Group, build_groups, load_mixture, load_validation
from data.perception_dataset import Asked
from data.sources.record import Record, SkipSample
from data.tokens import Tokenizer
from data.transforms import ImageTransform
from inference_pipeline.parts import (
    Progress,
    Rows,
    add_model_flags,
    parse_with_parts,
    part_file,
    pin,
    read_parts,
    read_rows,
    weights_of,
)
from train.files import replace_text
from train.metrics import METRICS
from train.metrics.base import SummedMetric, ratio
from train.metrics.boxes import box_iou
from train.metrics.masks import mask_iou

if TYPE_CHECKING:  # merging needs no model
    from inference_pipeline.inferencer import Answer, Inferencer

PREFIX = {"forced": "forced", "generate": "generated"}
"""Mode -> what its figures are called."""

HEAD_METRICS: Mapping[str, tuple[str, ...]] = {
    "box": ("box",),
    "mask": ("mask", "lisa", "gres", "dice", "hd95"),
}
"""Head -> the rows of METRICS that suit it."""

OPTIONAL = ("dice", "hd95")
"""Metrics that are asked for with --metrics."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question about a record's picture."""

    sample_id: str
    group: Group
    record: Record
    file: str
    asked: Asked


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, or merge what several processes evaluated; 1 and one clear line if the input cannot be used."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        weights, called = weights_of(args)
        name, out = args.name or called, args.output_dir
        args.output_dir = out / name / args.mode
        args.output_dir.mkdir(parents=True, exist_ok=True)
        pin(
            {
                **{
                    key: getattr(args, key) for key in ("weights", "mode", "metrics", "groups", "num_samples")
                },
                "batch_size": args.batch_size,
                "max_new_tokens": args.max_new_tokens,
                "weights_modified": weights.stat().st_mtime_ns,
            },
            args.output_dir,
        )
        groups = open_groups(args)
        questions, skipped = read_questions(groups, args.num_samples)
        if args.mode == "forced" and (given := [q.group.name for q in questions if not q.asked.answer]):
            raise ValueError(
                f"group {given[0]!r}: its boxes are texts, so to give the answer is to give the box; use --mode generate"
            )
        if not args.merge:
            evaluate(questions, args)
        if args.merge or args.num_shards == 1:
            rows = complete(questions, args)
            for row in rows:
                if "skipped" in row:
                    skipped.setdefault(row["group"], []).append(row["skipped"])
            report = {
                "name": name,
                "mode": args.mode,
                "timestamp": datetime.now(UTC).isoformat(timespec="seconds"),
                "skipped": skipped,
                "groups": {group.name: figures(rows, group.name, PREFIX[args.mode]) for group in groups},
            }
            replace_text(out / f"{name}_{args.mode}.json", json.dumps(report, indent=2) + "\n")
            add_to_history(out / "training_history.json", report)
            print(*lines(report), f"written to {out}/{name}_{args.mode}.json", sep="\n")
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a value that cannot work stops the program here."""
    parser = argparse.ArgumentParser(description="evaluate boxes and masks on groups of a mixture YAML")
    add_model_flags(parser)
    parser.add_argument("--dataset_config_file", type=Path, required=True, help="the mixture YAML")
    parser.add_argument(
        "--groups",
        default="",
        help="comma-separated; default: all of `val:` (without one, of the mixture) that ask for places",
    )
    parser.add_argument(
        "--mode", choices=PREFIX, required=True, help="whether the answers are given, or have to be generated"
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--name", default="", help="of the checkpoint, say epoch_3; default: that of the model"
    )
    parser.add_argument(
        "--metrics", default="", help=f"comma-separated, besides those of each head: {', '.join(OPTIONAL)}"
    )
    parser.add_argument(
        "--num_samples", type=int, default=-1, help="at most so many records per group; -1 = all"
    )
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--index_cache_dir", default="", help="directory for the indexes of the data")
    args = parse_with_parts(parser, argv)
    args.metrics = [name for name in args.metrics.split(",") if name]
    if unknown := [name for name in args.metrics if name not in OPTIONAL]:
        parser.error(f"--metrics {unknown[0]}: known are {', '.join(OPTIONAL)}")
    return args


# ---------------------------------------------------------------------------------------------------------- what is asked


def open_groups(args: argparse.Namespace) -> tuple[Group, ...]:
    """The groups to evaluate on.

    Raises:
        ValueError: if one is not there, or asks for no place.
    """
    file = args.dataset_config_file
    own = load_validation(file)
    specs = {
        spec.name: spec for spec in (*load_mixture(file), *own)
    }  # a group of `val:` before one of training
    names = [name for name in args.groups.split(",") if name]
    if unknown := [name for name in names if name not in specs]:
        raise ValueError(f"--groups {unknown[0]}: {file} has the groups {', '.join(specs)}")
    chosen = [specs[name] for name in names or ([spec.name for spec in own] or specs)]
    chosen = [spec for spec in chosen if names or hasattr(spec.dataset_class, "asked")]
    if wrong := [spec.name for spec in chosen if not hasattr(spec.dataset_class, "asked")]:
        raise ValueError(f"--groups {wrong[0]}: its samples ask for no box and no mask")
    if not chosen:
        raise ValueError(f"{file}: no group asks for boxes or masks; add one under val:")
    return build_groups(chosen, Tokenizer(args.model_path), args.index_cache_dir or None)


def read_questions(groups: Sequence[Group], limit: int) -> tuple[list[Question], dict[str, list[str]]]:
    """All questions in order, the same in every process, and per group why records were left out."""
    questions: list[Question] = []
    skipped: dict[str, list[str]] = {}
    for group in groups:
        count = len(group.source) if limit < 0 else min(limit, len(group.source))
        for index in range(count):
            where = f"{group.name} record {index}"
            try:
                record = group.source.read(index)
                where = record.where
                file, asked = group.dataset.asked(record)  # type: ignore[attr-defined]  # checked in open_groups
            except SkipSample as e:
                message = e.message if (e.where or where) in e.message else f"{where}: {e.message}"
                skipped.setdefault(group.name, []).append(message)
                continue
            questions += [
                Question(
                    sample_id=f"{group.name}-{index:06d}-{k}",
                    group=group,
                    record=record,
                    file=file,
                    asked=one,
                )
                for k, one in enumerate(asked)
            ]
    for name, reasons in skipped.items():
        print(f"{name}: {len(reasons)} records cannot be used, first: {reasons[0]}", file=sys.stderr)
    return questions, skipped


# ----------------------------------------------------------------------------------------------------------- the questions


def evaluate(questions: Sequence[Question], args: argparse.Namespace) -> None:
    """Ask every question of this process that has no row yet and append the rows, a batch at a time."""
    part = part_file(args)
    done = read_rows(part)
    own = questions[args.shard :: args.num_shards]
    waiting = [q for q in own if q.sample_id not in done]
    if not waiting:
        print(f"{part}: all {len(own)} samples are done")
        return
    from inference_pipeline.inferencer import Inferencer

    model = Inferencer.from_model_dir(
        args.model_path, weights=args.weights, device=args.device, adapter=args.adapter
    )
    progress = Progress(
        total=len(waiting), label=f"[{args.shard + 1}/{args.num_shards}] " * (args.num_shards > 1)
    )
    with part.open("a", encoding="utf-8") as file:
        for batch in _batches(waiting, args.batch_size):
            for row in ask(model, batch, args):
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(len(batch), batch[0].asked.head)


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Of one group each: its transform is the model's eye."""
    for group in dict.fromkeys(q.group.name for q in questions):
        own = [q for q in questions if q.group.name == group]
        yield from (own[i : i + size] for i in range(0, len(own), size))


def ask(model: "Inferencer", batch: Sequence[Question], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per question."""
    from inference_pipeline.inferencer import Prompt

    readable: list[tuple[Question, Image.Image]] = []
    for question in batch:
        try:
            readable.append((question, _picture(question)))
            if question.asked.mask is not None:
                question.asked.mask(readable[-1][1].size)  # a truth that cannot be read is no question
        except SkipSample as e:
            readable = [pair for pair in readable if pair[0] is not question]
            yield {**_columns(question), "answered": False, "skipped": e.message, "sums": {}}
    batch, pictures = [q for q, _ in readable], [p for _, p in readable]
    if not batch:
        return
    start = time.perf_counter()
    transform = batch[0].group.dataset.vit_transform
    assert isinstance(transform, ImageTransform), "classes that ask for places need a transform for the ViT"
    answers = model.seeing(transform).answer(
        [Prompt(images=(p,), text=q.asked.question) for p, q in zip(pictures, batch, strict=True)],
        max_new_tokens=args.max_new_tokens,
        told=[q.asked.answer for q in batch] if args.mode == "forced" else None,
    )
    seconds = (time.perf_counter() - start) / len(batch)
    for question, picture, answer in zip(batch, pictures, answers, strict=True):
        yield result_row(question, picture.size, answer, args.metrics, seconds)


def _picture(question: Question) -> Image.Image:
    return Image.fromarray(question.group.dataset.open_image(question.record, question.file).rgb)


def result_row(
    question: Question, size: tuple[int, int], answer: "Answer", metrics: Sequence[str], seconds: float
) -> dict[str, Any]:
    """What was asked, said and true, and the sample's share of every metric (`SummedMetric.to_json`)."""
    asked = question.asked
    row = {**_columns(question), "answer": answer.text, "inference_time_s": round(seconds, 4)}
    if asked.head == "box":
        assert asked.box is not None
        predicted = answer.boxes[0] if answer.boxes else _box_in_text(question, answer.text, size)
        iou = 0.0 if predicted is None else box_iou(predicted, asked.box)
        sums = {name: _sums(METRICS[name](), predicted, asked.box) for name in HEAD_METRICS["box"]}
        return {
            **row,
            "answered": predicted is not None,
            "iou": iou,
            "pred_box": None if predicted is None else [round(float(v), 3) for v in predicted],
            "gt_box": list(asked.box),
            "sums": sums,
        }
    assert asked.mask is not None
    truth = asked.mask(size)
    mask: NDArray[np.bool_] | None = np.logical_or.reduce(answer.masks) if answer.masks else None
    wanted = [name for name in HEAD_METRICS["mask"] if name not in OPTIONAL or name in metrics]
    sums = {}
    for name in wanted:
        more = (asked.facts.get("spacing"),) if name == "hd95" else ()
        sums[name] = _sums(METRICS[name](), mask, truth, *more)
    iou = 0.0 if mask is None else mask_iou(mask, truth)
    return {**row, "answered": mask is not None, "iou": iou, "sums": sums}


def _columns(question: Question) -> dict[str, Any]:
    return {
        "sample_id": question.sample_id,
        "group": question.group.name,
        "where": question.record.where,
        "head": question.asked.head,
        "name": question.asked.name,
        "question": question.asked.question,
        "facts": {key: value for key, value in question.asked.facts.items() if key != "spacing"},
    }


def _sums(metric: SummedMetric, *outputs: Any) -> dict[str, Any]:
    metric.update(*outputs)
    return metric.to_json()


def _box_in_text(question: Question, text: str, size: tuple[int, int]) -> tuple[float, ...] | None:
    """The first box that a text names, in pixels, where the group's boxes are texts."""
    form: BoxText | None = getattr(question.group.dataset, "box_text", None)
    if form is None:
        return None
    transform = question.group.dataset.vit_transform
    assert isinstance(transform, ImageTransform)
    found = form.read(text, transform.resized(*size))  # pixels are those of the picture that the model sees
    sides = (*size, *size)
    return tuple(v * side for v, side in zip(found[0][0], sides, strict=True)) if found else None


# ------------------------------------------------------------------------------------------------------------- the figures


def complete(questions: Sequence[Question], args: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of all processes in the order of the questions, written to results.jsonl.

    Raises:
        ValueError: if one is missing.
    """
    found: Rows = read_parts(args.output_dir)
    absent = [q.sample_id for q in questions if q.sample_id not in found]
    if absent:
        raise ValueError(
            f"{args.output_dir}: {len(absent)} of {len(questions)} samples have no row, {absent[0]} first; run every shard "
            "to its end"
        )
    rows = [found[q.sample_id] for q in questions]
    replace_text(args.output_dir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def figures(rows: Sequence[Mapping[str, Any]], group: str, prefix: str) -> dict[str, Any]:
    """The figures of one group, and where its rows have a modality, of each of these."""
    own = [row for row in rows if row["group"] == group and "skipped" not in row]
    result: dict[str, Any] = {"samples": len(own), **_figures(own, prefix)}
    modalities = sorted({str(row["facts"]["modality"]) for row in own if row["facts"].get("modality")})
    if modalities:
        result["by_modality"] = {
            m: _figures([row for row in own if str(row["facts"].get("modality")) == m], prefix)
            for m in modalities
        }
    return result


def _figures(rows: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, float]:
    merged: dict[str, SummedMetric] = {}
    for row in rows:
        for name, sums in row["sums"].items():
            metric = METRICS[name].from_json(sums)
            merged[name] = merged[name].merge(metric) if name in merged else metric
    computed = {f"{prefix}/{name}/{key}": v for name, m in merged.items() for key, v in m.compute().items()}
    for head in dict.fromkeys(row["head"] for row in rows):
        of_head = [row for row in rows if row["head"] == head]
        computed[f"{prefix}/{head}/answered"] = ratio(sum(row["answered"] for row in of_head), len(of_head))
    return computed


def add_to_history(file: Path, report: Mapping[str, Any]) -> None:
    """Append the report, in the place of an earlier one of the same name and mode.

    Raises:
        ValueError: if the file is none of ours.
    """
    history = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
    if not isinstance(history, list):
        raise ValueError(f"{file}: not a list of evaluations; move it away")
    others = [
        entry for entry in history if (entry["name"], entry["mode"]) != (report["name"], report["mode"])
    ]
    replace_text(file, json.dumps([*others, report], indent=2) + "\n")


def lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The figures for people."""
    for group, values in report["groups"].items():
        yield f"{group}: {values['samples']} samples"
        yield from (f"  {name:<32} {v:.4f}" for name, v in values.items() if isinstance(v, float))


if __name__ == "__main__":
    sys.exit(main())
