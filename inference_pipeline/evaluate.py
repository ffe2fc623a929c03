"""Evaluate a model directory on the quickstart's held-out files, through the KV-cache inference path.

In: a model directory, a data directory. Out, under --output_dir: results.jsonl (one row per sample), images/, statistics.json.

    python -m inference_pipeline.evaluate --model_path MODEL --data_dir DATA --output_dir OUT

Started again after a kill it goes on where it stopped. On several processes, each writes its own part and one merges them:

    python -m inference_pipeline.evaluate ... --shard 0 --num_shards 2 &
    python -m inference_pipeline.evaluate ... --shard 1 --num_shards 2 & wait
    python -m inference_pipeline.evaluate ... --merge
"""

import argparse
import json
import logging
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inference_pipeline.figures import compute_statistics, figure_lines, mean
from inference_pipeline.parts import (
    Progress,
    Settings,
    add_model_flags,
    parse_with_parts,
    part_file,
    pin,
    read_parts,
    read_rows,
    weights_of,
)
from inference_pipeline.questions import READERS, Question, read_questions
from inference_pipeline.scoring import Output, Rules, result_row, score
from train.files import replace_text
from train.metrics.digits import DigitJudge, measure

if TYPE_CHECKING:  # evaluating needs the model's code, merging parts does not
    from inference_pipeline.inferencer import Inferencer


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, or merge what several processes evaluated; 1 and one clear line if the input cannot be used."""
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")  # what was loaded, part by part
    try:
        questions = read_questions(args.data_dir, args.split, tuple(args.tasks.split(",")), args.num_samples)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        settings = pin_settings(args)
        drawn = any(q.task in ("t2i", "edit") for q in questions)
        judge = DigitJudge.from_manifest(args.data_dir / "manifest.json") if drawn else None
        rules = Rules(judge=judge, min_psnr_outside=args.min_psnr_outside)
        if not args.merge:
            evaluate(questions[args.shard :: args.num_shards], rules, args)
        if args.merge or args.num_shards == 1:
            facts = judge_facts(questions, rules, measure(judge, args.data_dir, args.split) if judge else {})
            statistics = write_statistics(
                questions, rules, args.output_dir, {**settings, **facts, "timestamp": _now()}
            )
            print(*figure_lines(statistics), f"written to {args.output_dir}/statistics.json", sep="\n")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; a value that cannot work stops the program here."""
    parser = argparse.ArgumentParser(description="evaluate a model directory on the quickstart's files")
    add_model_flags(parser)
    parser.add_argument("--model_id", default="", help="name in tables; default: name of the model directory")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="directory with vqa_SPLIT.jsonl, refer_SPLIT.json, ..."
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join(READERS), help="comma-separated; default: all")
    parser.add_argument("--num_samples", type=int, default=-1, help="at most so many of each task; -1 = all")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0, help="of the noise that pictures start from")
    parser.add_argument(
        "--min_psnr_outside", type=float, default=25.0, help="dB an edit must keep outside the named digit"
    )
    sampling = parser.add_argument_group("sampling of pictures")
    sampling.add_argument("--num_timesteps", type=int, default=25)
    sampling.add_argument("--cfg_text_scale", type=float, default=3.0)
    sampling.add_argument(
        "--edit_cfg_text_scale", type=float, help="text guidance of editing; default: --cfg_text_scale"
    )
    sampling.add_argument(
        "--cfg_img_scale",
        type=float,
        default=1.0,
        help="editing only; without effect while its text guidance is 1 or less, as published",
    )
    sampling.add_argument("--cfg_interval", type=float, nargs=2, default=(0.0, 1.0), metavar=("FROM", "TO"))
    sampling.add_argument("--cfg_renorm_min", type=float, default=0.0)
    sampling.add_argument(
        "--cfg_renorm_type", choices=("global", "channel", "text_channel"), default="global"
    )
    sampling.add_argument("--timestep_shift", type=float, default=1.0)
    return parse_with_parts(parser, argv)


# ------------------------------------------------------------------------------------------------------------ the loop


def evaluate(questions: Sequence[Question], rules: Rules, args: argparse.Namespace) -> None:
    """Ask every question that has no row yet and append the rows, a batch at a time."""
    part = part_file(args)
    done = {sample_id for sample_id, row in read_rows(part).items() if not row["missing"]}
    # Batches are cut before finished samples are left out: a resumed run forms the same batches, hence the same noise.
    waiting = [
        batch for batch in batches(questions, args.batch_size) if any(q.sample_id not in done for q in batch)
    ]
    if not waiting:
        print(f"{part}: all {len(questions)} samples are done")
        return
    from inference_pipeline.inferencer import Inferencer

    model = Inferencer.from_model_dir(
        args.model_path, weights=args.weights, device=args.device, adapter=args.adapter
    )
    progress = Progress(
        total=sum(map(len, waiting)), label=f"[{args.shard + 1}/{args.num_shards}] " * (args.num_shards > 1)
    )
    with part.open("a", encoding="utf-8") as file:
        for batch in waiting:
            start = time.perf_counter()
            outputs = ASK[batch[0].task](model, batch, args)
            seconds = (time.perf_counter() - start) / len(batch)
            # A shorter answer than the batch leaves the rest without output, which counts as a failure.
            for question, output in zip(
                batch, [*outputs, *[None] * (len(batch) - len(outputs))], strict=True
            ):
                row = result_row(question, output, rules, args.output_dir, seconds)
                file.write(json.dumps(row) + "\n")
            file.flush()
            progress.advance(len(batch), batch[0].task)


def batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """Questions of one task, picture size and order of answer and picture, at most `size` at a time."""
    alike: dict[tuple[str, tuple[int, int], bool], list[Question]] = {}
    for question in questions:
        alike.setdefault((question.task, question.size, question.answer_first), []).append(question)
    for run in alike.values():
        yield from (run[i : i + size] for i in range(0, len(run), size))


def answer(model: "Inferencer", batch: Sequence[Question], args: argparse.Namespace) -> list[Output]:
    """Ask for text, boxes and masks."""
    from inference_pipeline.inferencer import Prompt

    answers = model.answer(
        [Prompt(images=q.images, text=q.text) for q in batch], max_new_tokens=args.max_new_tokens
    )
    return [Output(text=a.text, boxes=tuple(a.boxes), masks=tuple(a.masks)) for a in answers]


def generate(model: "Inferencer", batch: Sequence[Question], args: argparse.Namespace) -> list[Output]:
    """Ask for pictures."""
    from inference_pipeline.inferencer import Prompt

    height, width = batch[0].size
    text_scale = args.cfg_text_scale
    if batch[0].task == "edit" and args.edit_cfg_text_scale is not None:
        text_scale = args.edit_cfg_text_scale
    generations = model.generate(
        [Prompt(images=q.images, text=q.text, answer_first=q.answer_first) for q in batch],
        height=height,
        width=width,
        num_timesteps=args.num_timesteps,
        cfg_text_scale=text_scale,
        cfg_img_scale=args.cfg_img_scale,
        cfg_interval=tuple(args.cfg_interval),
        cfg_renorm_min=args.cfg_renorm_min,
        cfg_renorm_type=args.cfg_renorm_type,
        max_new_tokens=args.max_new_tokens,
        timestep_shift=args.timestep_shift,
        seed=zlib.crc32(f"{args.seed} {batch[0].sample_id}".encode()),
    )
    return [Output(text=g.text, picture=np.asarray(g.image.convert("RGB"))) for g in generations]


ASK: Mapping[str, Callable[["Inferencer", Sequence[Question], argparse.Namespace], list[Output]]] = {
    "vqa": answer,
    "text": answer,
    "box": answer,
    "mask": answer,
    "t2i": generate,
    "edit": generate,
}


# ------------------------------------------------------------------------------------------------------------ the files


def write_statistics(
    questions: Sequence[Question], rules: Rules, output_dir: Path, settings: Settings
) -> dict[str, Any]:
    """Bring all rows into results.jsonl, in the order of the questions, and write statistics.json."""
    found = read_parts(output_dir)
    absent = [q.sample_id for q in questions if q.sample_id not in found]
    if absent:
        print(
            f"{len(absent)} samples have no output and count as failures, {absent[0]} first", file=sys.stderr
        )
    rows = [found.get(q.sample_id) or result_row(q, None, rules, output_dir) for q in questions]
    replace_text(output_dir / "results.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    statistics = compute_statistics(rows, settings)
    replace_text(output_dir / "statistics.json", json.dumps(statistics, indent=2) + "\n")
    return statistics


def pin_settings(args: argparse.Namespace) -> Settings:
    """How the run is made, kept in evaluation_settings.json: rows made in two ways must not meet in one results file.

    Raises:
        ValueError: if the weights are not there, or --output_dir holds rows that were made otherwise, naming a difference.
    """
    where = {"data_dir", "output_dir", "shard", "num_shards", "merge", "model_path", "adapter", "device"}
    weights, called = weights_of(args)
    settings = {
        **{name: value for name, value in sorted(vars(args).items()) if name not in where},
        "model_id": args.model_id or called,
        "cfg_interval": list(args.cfg_interval),
        "weights_modified": weights.stat().st_mtime_ns,
    }
    pin(settings, args.output_dir)
    return settings


def judge_facts(questions: Sequence[Question], rules: Rules, accuracy: Mapping[str, float]) -> dict[str, Any]:
    """How good the judge is: on real test digits, and on this test's true pictures, which says what a perfect model would get."""
    perfect: dict[str, list[dict[str, Any]]] = {"t2i": [], "edit": []}
    for question in questions:
        if question.task in perfect:
            perfect[question.task].append(score(question, Output(picture=question.true_picture), rules))
    return {
        "judge_accuracy_on_real_test_digits": accuracy.get("digit_at_box"),
        "judge_accuracy": dict(accuracy),
        "judge_on_true_pictures_digit": mean(perfect["t2i"], "digit_right"),
        "judge_on_true_pictures_colour": mean(perfect["t2i"], "colour_right"),
        "judge_on_true_pictures_edit": mean(perfect["edit"], "correct"),
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
