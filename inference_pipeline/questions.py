"""The evaluation files of a data directory, read into `Question`s: what is asked and what is true. Used by `evaluate.py`.

Every kind of question is one row of `READERS`: a function of (data directory, split) that gives its questions in order.
Sample ids are made of the file's kind, row and turn, so they are the same on every machine and in every shard.
"""

import inspect
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.conversation import IMAGE
from data.dataset_base import SkipSample
from data.perception_dataset import ReferDataset
from data.rows import ChatRow, read_row
from data.transforms.boxes import read_mask

TEMPLATES: Mapping[str, Sequence[str]] = {
    task: inspect.signature(ReferDataset).parameters[f"{task}_templates"].default for task in ("box", "mask")
}
"""The questions that training asks, read where they are written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Glyph:
    """A digit of a scene: its value, colour and box (xyxy in pixels)."""

    digit: int
    colour: str
    box: tuple[float, float, float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Edit:
    """What an editing instruction asks: `kind` is recolour or remove, `target` the digit before, `colour` the new one."""

    kind: str
    target: Glyph
    colour: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One sample of an evaluation.

    Attributes:
        sample_id: unique and stable.
        task: row of `evaluate.ASK` (vqa, box, mask, t2i, edit, text).
        main_task_type, sub_task_type: what the data calls it.
        text: the prompt; `<image>`s are where its pictures stand, which is first if there is none.
        images: files that belong to the prompt.
        answer: the true answer text, or what is asked for in words.
        box: true box, xyxy in pixels.
        mask: `hh ww`, true mask.
        scene: the digits that the picture asked for has to show.
        edit: what is asked of an edited picture.
        answer_first: the answer text comes before the picture, as in the row.
        picture: file content of the true picture.
        size: height and width of the picture asked for.
    """

    sample_id: str
    task: str
    main_task_type: str
    sub_task_type: str
    text: str
    images: tuple[Path, ...] = ()
    answer: str = ""
    box: tuple[float, float, float, float] | None = None
    mask: NDArray[np.bool_] | None = None
    scene: tuple[Glyph, ...] = ()
    edit: Edit | None = None
    answer_first: bool = False
    picture: bytes = field(default=b"", repr=False)
    size: tuple[int, int] = (0, 0)

    @property
    def true_picture(self) -> NDArray[np.uint8]:
        """`hh ww 3` uint8."""
        return np.asarray(Image.open(io.BytesIO(self.picture)).convert("RGB"))


def read_vqa(root: Path, split: str) -> Iterator[Question]:
    """Every human turn is its own question, asked alone about the row's picture."""
    return _turns(root, root / f"vqa_{split}.jsonl", "vqa")


def read_text(root: Path, split: str) -> Iterator[Question]:
    """Every human turn is its own question."""
    return _turns(root, root / f"text_{split}.jsonl", "text")


def read_edit(root: Path, split: str) -> Iterator[Question]:
    """One instruction and one edited picture per row."""
    for where, number, row in _json_lines(root / f"edit_{split}.jsonl"):
        with _naming(where):
            instruction, report = read_row(ChatRow, row).turns
            edit, after = row["meta"]["edit"], row["output_img"][0]
            target = Glyph(digit=edit["digit"], colour=edit["from"], box=tuple(edit["box"]))
            yield Question(
                sample_id=f"edit-{number:06d}",
                task="edit",
                main_task_type=row["main_task_type"],
                sub_task_type=row["sub_task_type"],
                text=instruction.text.strip(),
                images=tuple(root / image["path"] for image in row["input_img"]),
                answer=_spoken(report.text),
                scene=_glyphs(row["meta"]["after"]),
                edit=Edit(kind=edit["kind"], target=target, colour=edit["to"]),
                answer_first=not report.text.lstrip().startswith(IMAGE),
                picture=(root / after["path"]).read_bytes(),
                size=(after["height"], after["width"]),
            )


def read_t2i(root: Path, split: str) -> Iterator[Question]:
    """One caption per member pair KEY.json, KEY.png of the split's shards."""
    shards = sorted(root.glob(f"t2i_{split}-*.tar"))
    if not shards:
        raise ValueError(
            f"{root}/t2i_{split}-*.tar: no shard found; make the data first or leave t2i out of --tasks"
        )
    for shard in shards:
        with _naming(f"{shard}"):
            tar = tarfile.open(shard)
            members = {member.name: member for member in tar if member.isfile()}
        with tar:
            for name in sorted(n for n in members if n.endswith(".json")):
                key = name.removesuffix(".json")
                with _naming(f"{shard}, member {key}"):
                    row, picture = (_content(tar, members[f"{key}.{kind}"]) for kind in ("json", "png"))
                    record = json.loads(row)
                    width, height = Image.open(io.BytesIO(picture)).size
                    scene = _glyphs(record["meta"]["digits"])
                    yield Question(
                        sample_id=f"t2i-{key}",
                        task="t2i",
                        main_task_type="generation",
                        sub_task_type=f"{len(scene)} digit" + "s" * (len(scene) != 1),
                        text=record["caption"],
                        answer=", ".join(f"{g.colour} {g.digit}" for g in scene),
                        scene=scene,
                        picture=picture,
                        size=(height, width),
                    )


def read_refer(root: Path, split: str) -> Iterator[Question]:
    """A box and a mask question per annotation; expressions and question templates take turns from one to the next."""
    path = root / f"refer_{split}.json"
    with _naming(f"{path}"):
        coco = json.loads(_text_of(path))
        images, annotations = {image["id"]: image for image in coco["images"]}, coco["annotations"]
    for number, annotation in enumerate(annotations):
        with _naming(f"{path}, annotation {annotation.get('id', number)}"):
            image = images[annotation["image_id"]]
            name = annotation["expressions"][number % len(annotation["expressions"])]
            x, y, width, height = annotation["bbox"]
            for task, templates in TEMPLATES.items():
                yield Question(
                    sample_id=f"{task}-{annotation['id']:06d}",
                    task=task,
                    main_task_type=f"referring_{task}",
                    sub_task_type="referring",
                    text=templates[number % len(templates)].format(ref=name),
                    images=(root / image["file_name"],),
                    answer=name,
                    box=(x, y, x + width, y + height),
                    mask=_mask(annotation, (image["width"], image["height"])) if task == "mask" else None,
                )


READERS: Mapping[str, Callable[[Path, str], Iterator[Question]]] = {
    "vqa": read_vqa,
    "refer": read_refer,
    "t2i": read_t2i,
    "edit": read_edit,
    "text": read_text,
}


def read_questions(root: Path, split: str, kinds: tuple[str, ...], limit: int = -1) -> list[Question]:
    """The questions of the named rows of `READERS`; at most `limit` of each task if that is not negative.

    Raises:
        ValueError: for an unknown kind, a missing file or a row that cannot be used, naming it.
    """
    by_task: dict[str, list[Question]] = {}
    for kind in kinds:
        if kind not in READERS:
            raise ValueError(f"--tasks: unknown task '{kind}'; known are {', '.join(READERS)}")
        for question in READERS[kind](root, split):
            taken = by_task.setdefault(question.task, [])
            if limit < 0 or len(taken) < limit:
                taken.append(question)
    # Task by task, so that neighbours can share a batch and every n-th question is a fair share of each task.
    questions = [question for taken in by_task.values() for question in taken]
    if not questions:
        raise ValueError(
            f"{root}: no question in split '{split}' for {', '.join(kinds)}; is the data set empty?"
        )
    return questions


def _turns(root: Path, path: Path, task: str) -> Iterator[Question]:
    for where, number, row in _json_lines(path):
        with _naming(where):
            turns = read_row(ChatRow, row).turns
            kinds = row.get("meta", {}).get("kinds", [])
            images = tuple(root / image["path"] for image in row.get("input_img", []))
            for turn, (question, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
                yield Question(
                    sample_id=f"{task}-{number:06d}-{turn:02d}",
                    task=task,
                    main_task_type=row["main_task_type"],
                    sub_task_type=kinds[turn] if turn < len(kinds) else row["sub_task_type"],
                    text=_spoken(question.text),
                    images=images,
                    answer=_spoken(answer.text),
                )


def _mask(annotation: Mapping[str, Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """`hh ww`, the annotation's mask; `size` is width and height of the picture."""
    return np.asarray(read_mask(annotation["segmentation"], size, f"annotation {annotation['id']}")).astype(
        bool
    )


def _spoken(text: str) -> str:
    """What is said, without the places of the pictures."""
    return text.replace(IMAGE, "").strip()


def _glyphs(facts: Sequence[Mapping[str, Any]]) -> tuple[Glyph, ...]:
    return tuple(Glyph(digit=int(f["digit"]), colour=f["colour"], box=tuple(f["box"])) for f in facts)


def _json_lines(path: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """(where, number of the row, row) of every line."""
    for number, line in enumerate(_text_of(path).splitlines()):
        where = f"{path}:{number + 1}"
        try:
            yield where, number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: not valid JSON ({error})") from None


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(
            f"{path}: not found; check --data_dir and --split, or leave this kind out of --tasks"
        ) from None


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None, member.name  # only regular files are asked for
    return file.read()


@contextmanager
def _naming(where: str) -> Iterator[None]:
    """Turn what is wrong with one row into an error that names it: an evaluation must not shrink its own test set."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, OSError, tarfile.TarError, SkipSample) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ValueError(f"{where}: {what}") from error
