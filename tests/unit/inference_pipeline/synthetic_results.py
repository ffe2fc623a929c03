"""A small evaluation directory with every task, a success, a failure and a sample without output each."""

import json

import numpy as np
from PIL import Image

NASTY = '<script>alert("&")</script>'

COLUMNS = {
    "vqa": {},
    "text": {},
    "t2i": {"digit_right": True, "colour_right": True, "found": [[7, "red"]], "wanted": [[7, "red"]]},
    "edit": {
        "change_right": True,
        "others_right": True,
        "psnr_outside": 40.0,
        "psnr": 38.0,
        "found": [],
        "wanted": [],
    },
    "box": {"iou": 0.8, "pred_box": [1, 1, 5, 5], "gt_box": [1, 1, 5, 6]},
    "mask": {"mask_iou": 0.9, "gt_box": [1, 1, 5, 6]},
}


def _row(task, number, correct):
    scored = {
        k: (v if correct or not isinstance(v, bool | float) else type(v)(0)) for k, v in COLUMNS[task].items()
    }
    return {
        "sample_id": f"{task}-{number:06d}",
        "task": task,
        "main_task_type": {"t2i": "generation", "edit": "editing"}.get(task, task),
        "sub_task_type": "",
        "question": f"ask {task} {NASTY}",
        "answer": "yes" if correct else NASTY,
        "truth": "yes",
        "missing": False,
        "correct": correct,
        "input_images": ["images/input.png"] if task in ("vqa", "edit", "box", "mask") else [],
        **scored,
        "inference_time_s": 0.5,
    }


def make_rows():
    rows = [_row(task, number, number % 4 != 3) for task in COLUMNS for number in range(20)]
    for row in rows:
        if row["task"] in ("t2i", "edit"):
            row |= {"image": "images/input.png", "truth_image": "images/input.png"}
        if row["task"] == "mask":
            row |= {"pred_mask": "images/mask.png", "gt_mask": "images/mask.png"}
    silent = rows[-1]
    silent |= {"missing": True, "answer": "", "correct": False, "mask_iou": 0.0}
    silent.pop("pred_mask")
    return rows


def write_evaluation(directory, statistics):
    (directory / "images").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(directory / "images" / "input.png")
    Image.fromarray(((pixels[..., 0] > 99) * 255).astype(np.uint8)).save(directory / "images" / "mask.png")
    (directory / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in make_rows()))
    (directory / "statistics.json").write_text(json.dumps(statistics))
    return directory
