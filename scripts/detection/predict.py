"""Find everything in the pictures of a file of detection rows, and write what was found.

    python -m scripts.detection.predict --model_path MODEL --input_jsonl val.jsonl --output_file out.jsonl --mode head

One JSON line per row, appended as it is made; started again, it goes on where it stopped. `scripts.detection.validate_results`
counts what came out. Fields: `image`, `ground_truth` (JSON text), `pred_result` (what the model wrote, or the head's objects
written the same way), `predictions`, `parse_status`, `height`, `width`, `orig_size`, `resized_size`, `mode`, `teachers`,
`num_generated_tokens`, `truncated`, and `error` where there is one.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import Line, read_lines
from data.detections import Scene, answer_text
from data.rgb_image import to_rgb
from data.teachers import STRATEGIES, TeacherPool
from inference_pipeline.detection import Demonstration, Found, predict_detection
from inference_pipeline.inferencer import Inferencer

logger = logging.getLogger(__name__)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    logging.basicConfig(level=args.log_level, format="%(message)s")
    try:
        lines = read_lines(args.input_jsonl)[: args.max_samples if args.max_samples >= 0 else None]
        pool = None
        if args.teacher_pool_file:
            pool = TeacherPool.open(
                args.teacher_pool_file, args.teacher_sampling, args.teacher_features, args.teacher_difficulty
            )
        if args.num_teachers and pool is None:
            raise ValueError(f"--num_teachers {args.num_teachers} needs --teacher_pool_file")
        done = written_rows(args.output_file)
        model = Inferencer.from_model_dir(args.model_path, device=args.device)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    args.output_file.parent.mkdir(parents=True, exist_ok=True)
    with args.output_file.open("a", encoding="utf-8") as file:
        for number, line in enumerate(lines):
            if number >= done:
                row = predict_row(model, line, number, pool, args)
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                file.flush()
    print(f"{args.output_file}: {len(lines)} rows, {min(done, len(lines))} of them were there")
    return 0


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--input_jsonl", type=Path, required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--data_root", type=Path, help="where pictures lie; default: beside --input_jsonl")
    parser.add_argument("--mode", choices=("text", "head", "fused"), default="head")
    parser.add_argument("--score_threshold", type=float, default=0.3)
    parser.add_argument("--max_new_tokens", type=int, default=1024)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--max_samples", type=int, default=int(os.environ.get("MAX_SAMPLES", -1)))
    parser.add_argument("--language", choices=("english", "chinese"), default="english")
    parser.add_argument("--prompt", default="", help="as in training")
    parser.add_argument("--system_prompt", default="", help="as in training")
    parser.add_argument("--coordinates", choices=("pixels", "thousandths", "fraction"), default="pixels")
    parser.add_argument("--teacher_pool_file", default="")
    parser.add_argument("--num_teachers", type=int, default=int(os.environ.get("NUM_TEACHERS", 0)))
    parser.add_argument("--teacher_sampling", choices=STRATEGIES, default="random")
    parser.add_argument("--teacher_features", default="")
    parser.add_argument("--teacher_difficulty", default="")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of teachers, row by row")
    parser.add_argument("--log_level", default="INFO")
    return parser.parse_args(argv)


def written_rows(path: Path) -> int:
    """How many whole rows a file has; half a row at its end is taken away."""
    if not path.is_file():
        return 0
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    return whole.count(b"\n")


def predict_row(
    model: Inferencer, line: Line, number: int, pool: TeacherPool | None, args: argparse.Namespace
) -> dict[str, Any]:
    """The record of one row; what goes wrong is in it."""
    record: dict[str, Any] = {
        "image": "", "ground_truth": "[]", "pred_result": "", "predictions": [], "parse_status": None, "height": 0, "width": 0,
        "orig_size": None, "resized_size": None, "mode": args.mode, "teachers": [], "num_generated_tokens": 0, "truncated": False,
    }  # fmt: skip
    if line.row is None:
        return {**record, "error": line.error}
    student = line.row.student
    truth = answer_text([t.box for t in student.things], [t.label for t in student.things])
    record |= {"image": student.pictures[-1], "ground_truth": truth}
    root = args.data_root or args.input_jsonl.parent
    try:
        teachers = list(line.row.teachers)
        if pool is not None and not teachers:
            # What is to be found must not choose who teaches: the picture alone does.
            unknown = Scene(pictures=student.pictures, things=(), size=student.size, name=student.name)
            rng = np.random.default_rng([args.seed, number])
            teachers = pool.choose(unknown, args.num_teachers, rng, f"{args.input_jsonl}:{line.number}")
        shown = [
            Demonstration(image=_open(root, t), objects=[(o.box, o.label) for o in t.things])
            for t in teachers
        ]
        (found,) = predict_detection(
            model,
            [_open(root, student)],
            mode=args.mode,
            prompt=args.prompt,
            system_prompt=args.system_prompt,
            language=args.language,
            coordinates=args.coordinates,
            teachers=[shown],
            score_threshold=args.score_threshold,
            max_new_tokens=args.max_new_tokens,
        )
    except (ValueError, OSError) as error:
        return {**record, "error": str(error)}
    return {**record, **_facts(found), "teachers": [t.pictures[-1] for t in teachers]}


def _facts(found: Found) -> Mapping[str, Any]:
    boxes = [[round(v, 2) for v in d.bbox_2d] for d in found.detections]
    return {
        "pred_result": found.text or answer_text(boxes, [d.label for d in found.detections]),
        "predictions": [asdict(d) for d in found.detections],
        "parse_status": found.status,
        "dropped": list(found.dropped),
        "height": found.size[1],
        "width": found.size[0],
        "orig_size": list(found.size),
        "resized_size": list(found.resized),
        "num_generated_tokens": found.num_tokens,
        "truncated": found.truncated,
    }


def _open(root: Path, scene: Scene) -> Image.Image:
    with Image.open(root / scene.pictures[-1]) as image:
        return to_rgb(image).copy()


if __name__ == "__main__":
    sys.exit(main())
