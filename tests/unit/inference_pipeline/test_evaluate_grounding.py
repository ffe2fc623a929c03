"""Boxes and masks evaluated on groups of a YAML: answers given and generated, one process and two, a kill between."""

import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from data.transforms.image import ImageTransform
from inference_pipeline import evaluate_grounding
from inference_pipeline.inferencer import Answer, Inferencer, Prompt
from tests.unit.modeling.tiny import tiny_decoder
from train.metrics.masks import GresIou, LisaIou

VIT = ImageTransform(max_image_size=32, min_image_size=16, stride=8)
VAE = ImageTransform(max_image_size=32, min_image_size=16, stride=16)
MIXTURE = """
vlm_sft: {dataset_names: [none], weight: 1.0, vit_image_transform_args: {image_stride: 8, max_image_size: 32, min_image_size: 16}}
val:
  things:
    type: refer_jsonl
    dataset_names: [things]
    vit_image_transform_args: {image_stride: 8, max_image_size: 32, min_image_size: 16}
dataset_info:
  vlm_sft: {none: {jsonl_path: none.jsonl}}
  refer_jsonl: {things: {jsonl_path: things.jsonl}}
"""


@pytest.fixture
def run(tmp_path, tokenizer, monkeypatch):
    """Runs the entry on five things in two pictures with the tiny model; gives the report."""
    rng = np.random.default_rng(0)
    for name, size in (("a.png", (40, 32)), ("b.png", (24, 48))):
        Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(tmp_path / name)
    square = {"size": [32, 40], "counts": [32 * 4, 64, 32 * 34]}
    rows = [
        {
            "img_path": "a.png",
            "expression": ["the red 7", "the big 7"],
            "bbox": [4, 0, 20, 30],
            "mask": square,
        },
        {"img_path": "b.png", "expression": "the blue 3", "bbox": [0, 0, 12, 12]},
        {"img_path": "gone.png", "expression": "nothing", "bbox": [0, 0, 12, 12]},
        {"img_path": "b.png", "expression": ""},
    ]
    (tmp_path / "things.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "data.yaml").write_text(MIXTURE)
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(tokenizer.path, model / "tokenizer.json")
    (model / "ema.safetensors").touch()
    plain = tiny_decoder(vocab_size=len(tokenizer))
    plain.special = tokenizer.special
    tiny = Inferencer(plain, tokenizer, VIT, VAE)
    monkeypatch.setattr(Inferencer, "from_model_dir", staticmethod(lambda *args, **kwargs: tiny))

    def start(out, *flags):
        argv = [
            "--model_path",
            str(model),
            "--dataset_config_file",
            str(tmp_path / "data.yaml"),
            "--batch_size",
            "2",
        ]
        return evaluate_grounding.main(
            [*argv, "--output_dir", str(tmp_path / out), "--name", "epoch_1", *flags]
        )

    return start, tmp_path, tiny


def report_of(path, mode="forced"):
    return json.loads((path / f"epoch_1_{mode}.json").read_text())


def test_given_answers_on_one_process_and_on_two_and_after_a_kill(run, capsys):
    start, folder, tiny = run
    flags = ["--mode", "forced", "--metrics", "dice,hd95"]
    assert start("one", *flags) == 0
    report = report_of(folder / "one")
    figures = report["groups"]["things"]
    # Each name of the first thing, box and mask; the third row's picture is gone, the last row says nothing.
    assert figures["samples"] == 5
    assert len(report["skipped"]["things"]) == 2 and "gone.png" in " ".join(report["skipped"]["things"])
    assert figures["forced/box/answered"] == figures["forced/mask/answered"] == 1.0
    assert {"forced/lisa/giou", "forced/gres/n_acc", "forced/dice/dice", "forced/hd95/hd95"} <= set(figures)
    rows = [
        json.loads(line) for line in (folder / "one/epoch_1/forced/results.jsonl").read_text().splitlines()
    ]
    assert [r["answer"] for r in rows if "answer" in r] == ["<BOX>", "<SEG>", "<BOX>", "<SEG>", "<BOX>"]

    # The masks are what the model sees at the token, at the size of the original.
    asked = Prompt(images=(folder / "a.png",), text="Segment the big 7.")
    (answer,) = tiny.answer([asked], told=["<SEG>"])
    truth = np.zeros((32, 40), bool)
    truth[:, 4:6] = True
    assert answer.masks[0].shape == truth.shape
    one = LisaIou()
    one.update(answer.masks[0], truth)
    assert rows[3]["sums"]["lisa"] == one.to_json()

    for shard in ("1", "0"):
        assert start("two", *flags, "--shard", shard, "--num_shards", "2") == 0
    part = folder / "two/epoch_1/forced/results.0.jsonl"
    whole = part.read_bytes()
    part.write_bytes(whole[:-20])  # killed within the last row
    assert start("two", *flags, "--merge") == 1
    assert "have no row" in capsys.readouterr().err
    assert start("two", *flags, "--shard", "0", "--num_shards", "2") == 0
    assert [json.loads(x)["sample_id"] for x in part.read_text().splitlines()] == [
        json.loads(x)["sample_id"] for x in whole.decode().splitlines()
    ]
    assert start("two", *flags, "--merge") == 0
    assert report_of(folder / "two")["groups"] == report["groups"]


def test_generated_answers_have_figures_of_their_own(run):
    start, folder, tiny = run
    said = iter(range(10**6))

    def answer(requests, **options):
        """Points at the left upper quarter, or at no pixel, for the first two questions, and at nothing for the rest."""
        assert options["told"] is None
        answers = []
        for request in requests:
            width, height = request.images[0].size
            mask = np.zeros((height, width), bool)
            points = next(said) < 2
            boxes = [(0.0, 0.0, width / 2, height / 2)] * (points and "Where" in request.text)
            answers.append(
                Answer(text="There.", boxes=boxes, masks=[mask] * (points and "Segment" in request.text))
            )
        return answers

    tiny.seeing = lambda transform: tiny
    tiny.answer = answer
    assert start("out", "--mode", "generate") == 0
    figures = report_of(folder / "out", "generate")["groups"]["things"]
    assert not any(name.startswith("forced") for name in figures)
    assert figures["generated/box/answered"] == pytest.approx(1 / 3)
    assert figures["generated/mask/answered"] == 0.5
    assert figures["generated/lisa/giou"] == 0.0 and figures["generated/gres/t_acc"] == 0.0
    assert "generated/dice/dice" not in figures

    history = json.loads((folder / "out/training_history.json").read_text())
    assert [(entry["name"], entry["mode"]) for entry in history] == [("epoch_1", "generate")]
    assert start("out", "--mode", "generate", "--merge") == 0  # again: the entry is replaced, not doubled
    assert len(json.loads((folder / "out/training_history.json").read_text())) == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--groups", "nowhere"], "--groups nowhere: .* has the groups"),
        (["--groups", "vlm_sft"], "--groups vlm_sft: its samples ask for no box and no mask"),
    ],
)
def test_groups_that_cannot_be_evaluated_are_named(run, capsys, flags, message):
    start, _, _ = run
    assert start("out", "--mode", "forced", *flags) == 1

    assert re.search(message, capsys.readouterr().err)


def test_boxes_that_are_written_as_text(run, capsys):
    start, folder, tiny = run
    rows = [{"img_path": "a.png", "expression": name, "bbox": [10, 8, 20, 16]} for name in ("it", "that")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mixture = MIXTURE.replace("type: refer_jsonl", "type: grounding_jsonl\n    box_format: pixels")
    mixture = mixture.replace(
        "refer_jsonl: {things: {jsonl_path: things.jsonl}}",
        "grounding_jsonl: {things: {jsonl_path: texts.jsonl}}",
    )
    (folder / "data.yaml").write_text(mixture)
    assert start("out", "--mode", "forced") == 1
    assert "to give the answer is to give the box" in capsys.readouterr().err

    # The model sees 40x32 px as 32x24 px, and says its boxes in these.
    said = {"it": "At [8,6,16,12].", "that": "I do not know."}
    tiny.seeing = lambda transform: tiny
    tiny.answer = lambda requests, **options: [
        Answer(text=next(text for name, text in said.items() if name in r.text), boxes=[], masks=[])
        for r in requests
    ]
    assert start("out", "--mode", "generate") == 0
    figures = report_of(folder / "out", "generate")["groups"]["things"]
    assert figures["generated/box/acc_90"] == figures["generated/box/answered"] == 0.5


def test_sums_of_a_row_are_those_of_its_metric():
    metric = GresIou()
    metric.update(None, np.zeros((4, 4), np.uint8))
    again = GresIou.from_json(json.loads(json.dumps(metric.to_json())))
    assert again.compute() == metric.compute() and again.compute()["n_acc"] == 1.0
    with pytest.raises(ValueError, match="not the sums of LisaIou"):
        LisaIou.from_json(metric.to_json())
