"""Make the quickstart data: small scenes of coloured handwritten digits, in the file formats that users have.

In: the 1,797 digits inside scikit-learn and photographs inside scikit-image; nothing is downloaded. The digits are split into
train, val and test, by class, before any scene is composed. Out, under `--output_dir`, for each SPLIT of train, val, test:

    SPLIT/images/*.png          scenes and edited scenes, 64x64 RGB
    vqa_SPLIT.jsonl             message rows: one scene, every question that has one right answer
    edit_SPLIT.jsonl            message rows: an instruction and a scene; where it applies, and the edited scene with a sentence
                                before or after it
    text_SPLIT.jsonl            message rows without images
    t2i_SPLIT-000000.tar ...    WebDataset shards: KEY.png and KEY.json {"caption", "meta"}
    refer_SPLIT.json            COCO: boxes, run-length masks and "expressions" that name one digit each
    manifest.json               counts, seed, which glyph is in which split, SHA-256 of every file

Paths in the rows are relative to `--output_dir`. The bytes depend on the seed and the counts, not on `--workers`.

    python scripts/data/make_quickstart.py --output_dir runs/quickstart/data
"""

import argparse
import hashlib
import io
import json
import multiprocessing
import re
import sys
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from scripts.data import quickstart_scenes as scenes

SPLITS = ("train", "val", "test")
GLYPHS_HELD_OUT = {"val": 180, "test": 360}
"""About so many; each class gives its share, rounded."""
SHARD_SIZE = 1000
CHUNK = 250
"""Scenes per job of a worker."""

Json = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ground:
    """What scenes are made of: one split's glyphs, the photographs, where to write and the random seed."""

    split: str
    seed: int
    root: Path
    glyphs: scenes.Glyphs
    photographs: dict[str, np.ndarray]

    def rng(self, task: str, index: int) -> np.random.Generator:
        """Of one example, so that it is the same whoever makes it."""
        return np.random.default_rng([self.seed, SPLITS.index(self.split), *task.encode(), index])


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """The rows of one example: its scene's VQA and edit rows, COCO image and annotations, its caption picture, its text."""

    vqa: Json
    edit: Json
    text: Json | None
    coco_image: Json
    coco_annotations: list[Json]
    t2i_png: bytes
    t2i: Json


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train_scenes", type=int, default=12000)
    parser.add_argument("--val_scenes", type=int, default=200)
    parser.add_argument("--test_scenes", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args(argv)
    sizes = {"train": args.train_scenes, "val": args.val_scenes, "test": args.test_scenes}
    if min(sizes.values()) < 1:
        parser.error("every split needs at least one scene")
    try:
        manifest = make(args.output_dir, sizes=sizes, seed=args.seed, workers=args.workers)
    except OSError as error:
        sys.exit(f"{error.filename or args.output_dir}: {error.strerror}; choose another --output_dir")
    for split in SPLITS:
        counts = ", ".join(f"{n} {what}" for what, n in manifest["counts"][split].items())
        print(f"{split}: {counts}")
    print(f"written to {args.output_dir}")


def make(root: Path, *, sizes: dict[str, int], seed: int, workers: int) -> Json:
    """Write the data set and its manifest; returns the manifest."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "manifest.json").unlink(missing_ok=True)  # it is written last: with it, the data set is complete
    glyphs, photographs = load_glyphs(), load_photographs()
    places = split_glyphs(glyphs.labels, seed)
    counts: dict[str, dict[str, int]] = {}
    for split, size in sizes.items():
        ground = Ground(
            split=split,
            seed=seed,
            root=root,
            glyphs=glyphs.take(places[split], jitter=split == "train"),
            photographs=photographs,
        )
        (root / split / "images").mkdir(parents=True, exist_ok=True)
        pictures = (root / split / "images").glob("*.png")
        ours = [p for p in pictures if re.fullmatch(r"(scene|edited)_\d{6}", p.stem)]
        for left_over in [*ours, *root.glob(f"t2i_{split}-[0-9]*.tar")]:
            left_over.unlink()
        counts[split] = write_split(ground, examples(ground, size, workers))
    manifest = {
        "seed": seed,
        "scenes": sizes,
        "counts": counts,
        "side": scenes.SIDE,
        "colours": {name: list(rgb) for name, rgb in scenes.COLOURS.items()},
        "mask": f"alpha >= {scenes.VISIBLE}; the box is its tight bounds",
        "photographs": sorted(photographs),
        "glyphs": {split: glyphs.index[places[split]].tolist() for split in SPLITS},
        "sha256": hashes(root),
    }
    (root / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return manifest


# ----------------------------------------------------------------------------------------------------------------- ground


def load_glyphs() -> scenes.Glyphs:
    """The handwritten digits of scikit-learn."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)
    return scenes.Glyphs(images=images, labels=digits.target, index=np.arange(len(images)))


def load_photographs() -> dict[str, np.ndarray]:
    """Photographs of scikit-image, each `h w 3` uint8."""
    import skimage.data

    loaded = {name: getattr(skimage.data, name)() for name in scenes.PHOTOGRAPHS}
    return {name: np.stack([p] * 3, -1) if p.ndim == 2 else p for name, p in loaded.items()}


def split_glyphs(labels: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Places of each split's glyphs; every class is divided in the same proportions."""
    rng = np.random.default_rng([seed, 1797])
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    for value in np.unique(labels):
        order = rng.permutation(np.flatnonzero(labels == value))
        val = round(len(order) * GLYPHS_HELD_OUT["val"] / len(labels))
        test = round(len(order) * GLYPHS_HELD_OUT["test"] / len(labels))
        for split, part in zip(
            SPLITS, np.split(order, [len(order) - val - test, len(order) - test]), strict=True
        ):
            parts[split].append(part)
    return {split: np.sort(np.concatenate(part)) for split, part in parts.items()}


# --------------------------------------------------------------------------------------------------------------- examples


def examples(ground: Ground, size: int, workers: int) -> Iterator[Made]:
    """`size` examples in order, made by `workers` processes."""
    bounds = [*range(0, size, CHUNK), size]
    jobs = [range(a, b) for a, b in pairwise(bounds)]
    make_chunk = partial(_make_chunk, ground)
    if workers <= 1 or len(jobs) == 1:
        for job in jobs:
            yield from make_chunk(job)
        return
    with multiprocessing.get_context("spawn").Pool(min(workers, len(jobs))) as pool:
        for chunk in pool.imap(make_chunk, jobs):
            yield from chunk


def _make_chunk(ground: Ground, indices: range) -> list[Made]:
    return [make_example(ground, index) for index in indices]


def make_example(ground: Ground, index: int) -> Made:
    """Everything about example `index`; its two pictures are written, the rows are returned."""
    scene = scenes.compose(ground.rng("scene", index), ground.glyphs, ground.photographs)
    image = _write_picture(ground, f"scene_{index:06d}.png", scene)
    t2i_png, t2i = caption_example(ground, index)
    return Made(
        vqa=vqa_row(scene, image, ground.rng("vqa", index), pointing=ground.split == "train"),
        edit=edit_row(ground, index, scene, image),
        text=text_row(ground.rng("text", index)) if index % 3 == 0 else None,
        coco_image={"id": index, "file_name": image["path"], "width": scenes.SIDE, "height": scenes.SIDE},
        coco_annotations=[annotation(index, d, scene) for d in scene.digits],
        t2i_png=t2i_png,
        t2i=t2i,
    )


def vqa_row(scene: scenes.Scene, image: Json, rng: np.random.Generator, *, pointing: bool) -> Json:
    """Every question about the scene; with `pointing`, also where each digit is: one picture teaches all of it at once."""
    turns = scenes.questions(rng, scene.digits)
    objects: Json = {"ref": [], "bbox": [], "mask": []}
    for digit in scene.digits if pointing else ():
        for kind, question, answer in (("box", "Where is {}?", "<BOX>"), ("mask", "Segment {}.", "<SEG>")):
            name = str(rng.choice(scenes.expressions(digit, scene.digits)))
            turns.append(scenes.Turn(kind=kind, question=question.format(name), answer=answer))
            objects["ref"].append(name)
            objects["bbox"].append(list(digit.box) if kind == "box" else None)
            objects["mask"].append(run_lengths(scenes.mask_of(digit)) if kind == "mask" else None)
    meta = {**scene.facts(), "kinds": [t.kind for t in turns]}
    row = _row("understanding", "vqa", [image], [], _messages(turns, "<image>\n"), meta)
    return {**row, "objects": objects} if pointing else row


def edit_row(ground: Ground, index: int, scene: scenes.Scene, image: Json) -> Json:
    rng = ground.rng("edit", index)
    edit = scenes.edit(rng, scene)
    edited = _write_picture(ground, f"edited_{index:06d}.png", edit.after)
    text_first = bool(rng.integers(2))
    # The place comes before the picture: said in words, it is learnt as words are, and the drawing has only to go by it.
    said = f"{edit.report} <image>" if text_first else f"<image> Now {edit.report}"
    answer = f"At {edit.square}: {said}"
    message = [
        # The instruction comes first too: the input picture is then read, and its latents taken up, with it in mind.
        {"from": "human", "value": f"{edit.instruction} <image>"},
        {"from": "gpt", "value": answer},
    ]
    order = "text_first" if text_first else "image_first"
    meta = {**scene.facts(), "after": edit.after.facts()["digits"], "edit": edit.facts, "order": order}
    return _row("editing", edit.facts["kind"], [image], [edited], message, meta)


def text_row(rng: np.random.Generator) -> Json:
    turns = scenes.text_turns(rng, int(rng.integers(1, 4)))
    return _row("text", "facts", [], [], _messages(turns, ""), {"kinds": [t.kind for t in turns]})


def caption_example(ground: Ground, index: int) -> tuple[bytes, Json]:
    # Written as they are: nothing that the caption does not say should make two pictures of it differ much.
    glyphs = replace(ground.glyphs, jitter=False)
    scene, caption, places = scenes.compose_for_caption(ground.rng("t2i", index), glyphs)
    return _png(scenes.draw(scene)), {"caption": caption, "meta": {**scene.facts(), "places": places}}


def annotation(image_id: int, digit: scenes.Digit, scene: scenes.Scene) -> Json:
    x0, y0, x1, y1 = digit.box
    mask = scenes.mask_of(digit)
    return {
        "image_id": image_id,
        "category_id": digit.value,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": run_lengths(mask),
        "expressions": scenes.expressions(digit, scene.digits),
        "colour": digit.colour,
        "glyph": digit.glyph,
    }


def run_lengths(mask: np.ndarray) -> Json:
    """COCO's uncompressed run-length code of a 0/1 mask: lengths of the runs down the columns, zeros first."""
    flat = np.concatenate([[0], mask.ravel(order="F"), [0]])
    changes = np.flatnonzero(np.diff(flat))
    edges = np.concatenate([[0], changes, [mask.size]])
    counts = np.diff(edges)
    return {"size": list(mask.shape), "counts": (counts if counts[-1] else counts[:-1]).tolist()}


def _messages(turns: Sequence[scenes.Turn], prefix: str) -> list[Json]:
    message: list[Json] = []
    for i, turn in enumerate(turns):
        message.append({"from": "human", "value": (prefix if i == 0 else "") + turn.question})
        message.append({"from": "gpt", "value": turn.answer})
    return message


def _row(
    main: str, sub: str, inputs: list[Json], outputs: list[Json], message: list[Json], meta: Json
) -> Json:
    return {
        "main_task_type": main,
        "sub_task_type": sub,
        "input_img": inputs,
        "output_img": outputs,
        "message": message,
        "meta": meta,
    }


def _write_picture(ground: Ground, name: str, scene: scenes.Scene) -> Json:
    path = f"{ground.split}/images/{name}"
    (ground.root / path).write_bytes(_png(scenes.draw(scene)))
    return {"path": path, "height": scenes.SIDE, "width": scenes.SIDE}


def _png(pixels: scenes.Pixels) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG", compress_level=3)
    return file.getvalue()


# ------------------------------------------------------------------------------------------------------------------ files


def write_split(ground: Ground, made: Iterator[Made]) -> dict[str, int]:
    """Write one split's files as the examples arrive; returns how many of each there are."""
    root, split = ground.root, ground.split
    images: list[Json] = []
    annotations: list[Json] = []
    counts = {"vqa": 0, "questions": 0, "edit": 0, "t2i": 0, "text": 0}
    with (
        (root / f"vqa_{split}.jsonl").open("w") as vqa,
        (root / f"edit_{split}.jsonl").open("w") as edit,
        (root / f"text_{split}.jsonl").open("w") as text,
        ShardWriter(root, f"t2i_{split}") as shards,
    ):
        for one in made:
            _write_line(vqa, one.vqa)
            _write_line(edit, one.edit)
            if one.text is not None:
                _write_line(text, one.text)
                counts["text"] += 1
            shards.add(one.t2i_png, one.t2i)
            images.append(one.coco_image)
            annotations += [{"id": len(annotations) + i, **a} for i, a in enumerate(one.coco_annotations)]
            counts["questions"] += len(one.vqa["message"]) // 2
            for what in ("vqa", "edit", "t2i"):
                counts[what] += 1
    categories = [{"id": value, "name": str(value), "supercategory": "digit"} for value in range(10)]
    coco = {"images": images, "categories": categories, "annotations": annotations}
    (root / f"refer_{split}.json").write_text(json.dumps(coco) + "\n")
    return {
        **counts,
        "regions": len(annotations),
        "expressions": sum(len(a["expressions"]) for a in annotations),
    }


def _write_line(file: io.TextIOBase | Any, row: Json) -> None:
    file.write(json.dumps(row) + "\n")


class ShardWriter:
    """Tar shards of `SHARD_SIZE` examples, `prefix-000000.tar` and so on; the same bytes for the same examples."""

    def __init__(self, root: Path, prefix: str):
        self._root, self._prefix, self._count = root, prefix, 0
        self._tar: tarfile.TarFile | None = None

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._tar is not None:
            self._tar.close()

    def add(self, png: bytes, record: Json) -> None:
        if self._count % SHARD_SIZE == 0:
            self.__exit__()
            shard = self._root / f"{self._prefix}-{self._count // SHARD_SIZE:06d}.tar"
            self._tar = tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 (closed by __exit__)
        assert self._tar is not None
        for name, content in (("png", png), ("json", json.dumps(record).encode())):
            member = tarfile.TarInfo(f"{self._count:06d}.{name}")
            member.size = len(content)
            self._tar.addfile(member, io.BytesIO(content))
        self._count += 1


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file beside the manifest; an `images` directory has one, over its files' names and hashes."""
    found = {path.name: _sha256(path.read_bytes()) for path in sorted(root.iterdir()) if path.is_file()}
    for split in SPLITS:
        lines = [f"{p.name} {_sha256(p.read_bytes())}\n" for p in sorted((root / split / "images").iterdir())]
        found[f"{split}/images"] = _sha256("".join(lines).encode())
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


if __name__ == "__main__":
    main()
