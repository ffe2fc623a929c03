"""Questions to rows to figures: what is counted, and that nothing is dropped."""

import argparse
import io
import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from inference_pipeline import evaluate
from inference_pipeline.figures import FIGURES, compute_statistics, figure_lines
from inference_pipeline.questions import Edit, Glyph, Question, read_questions
from inference_pipeline.scoring import Output, Rules, edit_done, others_kept, result_row, score
from tests.unit.inference_pipeline.synthetic_results import make_rows

SEVEN = Glyph(digit=7, colour="red", box=(0, 0, 10, 10))
TWO = Glyph(digit=2, colour="blue", box=(20, 20, 30, 30))
PAINT = Edit(kind="recolour", target=SEVEN, colour="green")
REMOVE = Edit(kind="remove", target=SEVEN, colour="")


def _found(digit, colour, box):
    return SimpleNamespace(digit=digit, colour=colour, box=box)


GREEN_7, RED_7, BLUE_2 = (
    _found(7, "green", (1, 1, 9, 9)),
    _found(7, "red", (1, 1, 9, 9)),
    _found(2, "blue", TWO.box),
)


# ---------------------------------------------------------------------------------------------------------------- figures


def test_figures_are_means_over_their_task():
    statistics = compute_statistics(make_rows(), {"seed": 3})
    assert statistics["vqa_exact"] == 0.75
    assert statistics["generation_digit"] == statistics["generation_colour"] == 0.75
    assert statistics["mask_miou"] == pytest.approx(0.9 * 15 / 20)
    assert statistics["n"] == dict.fromkeys(FIGURES, 20)
    assert statistics["overall"]["n"] == 120 and statistics["overall"]["missing_outputs"] == 1
    assert statistics["by_task_type"]["generation"]["n"] == 20
    assert statistics["seed"] == 3


def test_edits_are_told_apart_by_kind_and_digits():
    def edit(kind, left, correct):
        return {
            "task": "edit",
            "main_task_type": "editing",
            "edit_kind": kind,
            "wanted": [[1, "red"]] * left,
            "correct": correct,
        }

    rows = [
        edit("remove", 0, True),
        edit("remove", 0, False),
        edit("remove", 2, True),
        edit("recolour", 2, False),
    ]
    found = compute_statistics(rows, {})
    assert found["edit_success_by_kind_and_digits"] == {
        "recolour": {"2": {"n": 1, "edit_success": 0.0}},
        "remove": {"1": {"n": 2, "edit_success": 0.5}, "3": {"n": 1, "edit_success": 1.0}},
    }
    assert found["edit_success"] == 0.5 and len(figure_lines(found)) == len(FIGURES) + 1


def test_a_task_that_was_not_evaluated_has_no_figure():
    rows = [row for row in make_rows() if row["task"] != "edit"]
    statistics = compute_statistics(rows, {})
    assert statistics["edit_success"] is None and statistics["n"]["edit_success"] == 0
    assert any("edit_success" in line and " - " in line for line in figure_lines(statistics))


# ---------------------------------------------------------------------------------------------------------------- scoring


@pytest.mark.parametrize(
    ("found", "edit", "done", "kept"),
    [
        ([GREEN_7, BLUE_2], PAINT, True, True),
        ([RED_7, BLUE_2], PAINT, False, True),
        ([_found(1, "green", (1, 1, 9, 9)), BLUE_2], PAINT, False, True),
        ([GREEN_7, _found(2, "red", TWO.box)], PAINT, True, False),
        ([GREEN_7], PAINT, True, False),
        ([GREEN_7, BLUE_2, _found(3, "red", (40, 40, 50, 50))], PAINT, True, False),
        ([_found(7, "green", (40, 0, 50, 10)), BLUE_2], PAINT, False, False),
        ([BLUE_2], REMOVE, True, True),
        ([RED_7, BLUE_2], REMOVE, False, True),
    ],
)
def test_edit_is_judged_at_the_digits_places(found, edit, done, kept):
    after = (TWO,) if edit is REMOVE else (Glyph(digit=7, colour="green", box=SEVEN.box), TWO)
    assert (edit_done(found, edit), others_kept(found, after, edit)) == (done, kept)


def _png(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


@pytest.fixture
def edit_question(tmp_path):
    before = np.full((40, 40, 3), 60, dtype=np.uint8)
    (tmp_path / "before.png").write_bytes(_png(before))
    return Question(
        sample_id="edit-0",
        task="edit",
        main_task_type="editing",
        sub_task_type="recolour",
        text="Paint the red 7 green.",
        images=(tmp_path / "before.png",),
        scene=(Glyph(digit=7, colour="green", box=SEVEN.box), TWO),
        edit=PAINT,
        picture=_png(before),
        size=(40, 40),
    )


@pytest.mark.parametrize(("noise", "correct"), [(0, True), (10, True), (30, False)])
def test_edit_needs_a_still_background(edit_question, noise, correct):
    rules = Rules(judge=SimpleNamespace(read=lambda image: [GREEN_7, BLUE_2]))
    picture = np.full((40, 40, 3), 60 + noise, dtype=np.uint8)
    picture[:12, :12] = 255  # the digit's box and the two pixels around it may change
    columns = score(edit_question, Output(picture=picture), rules)
    assert columns["correct"] is correct and columns["change_right"] and columns["others_right"]


def test_edit_of_another_size_fails_and_does_not_crash(edit_question):
    rules = Rules(judge=SimpleNamespace(read=lambda image: [GREEN_7, BLUE_2]))
    columns = score(edit_question, Output(picture=np.zeros((8, 8, 3), dtype=np.uint8)), rules)
    assert not columns["correct"] and columns["psnr_outside"] == 0.0


def test_a_silent_model_gets_a_row_with_the_lowest_score(edit_question, tmp_path):
    rules = Rules(judge=SimpleNamespace(read=lambda image: []))
    common = {"main_task_type": "", "sub_task_type": "", "text": "?", "box": (0.0, 0.0, 2.0, 2.0)}
    questions = [
        edit_question,
        Question(sample_id="t2i-0", task="t2i", picture=edit_question.picture, **common),
        Question(sample_id="box-0", task="box", **common),
        Question(sample_id="mask-0", task="mask", mask=np.zeros((4, 4), dtype=bool), **common),
        Question(sample_id="vqa-0", task="vqa", answer="7", **common),
    ]
    for question in questions:
        row = result_row(question, None, rules, tmp_path)
        assert row["missing"] and not row["correct"]
        assert not row.get("iou") and not row.get("mask_iou") and not row.get("psnr")


# ------------------------------------------------------------------------------------------------------- reading and files


def test_every_human_turn_is_a_question_of_its_own(tmp_path):
    message = [
        {"from": "human", "value": "<image>\nHow many?"},
        {"from": "gpt", "value": "2"},
        {"from": "human", "value": "Which colour?"},
        {"from": "gpt", "value": "red"},
    ]
    row = {"main_task_type": "understanding", "sub_task_type": "vqa", "message": message, "output_img": []}
    row["input_img"] = [{"path": "a.png", "height": 4, "width": 4}]
    (tmp_path / "vqa_test.jsonl").write_text(json.dumps(row) + "\n")
    questions = read_questions(tmp_path, "test", ("vqa",))
    assert [(q.text, q.answer) for q in questions] == [("How many?", "2"), ("Which colour?", "red")]
    assert [q.images for q in questions] == [(tmp_path / "a.png",)] * 2
    assert len(read_questions(tmp_path, "test", ("vqa",), limit=1)) == 1


@pytest.mark.parametrize(
    ("content", "tasks", "said"),
    [
        ('{"message": \n', "vqa", r"vqa_test\.jsonl:1: not valid JSON"),
        ('{"main_task_type": "x"}\n', "vqa", r"vqa_test\.jsonl:1: .*message"),
        ("", "vqa", "no question"),
        ("", "text", r"text_test\.jsonl: not found"),
        ("", "t2i", r"t2i_test-\*\.tar: no shard"),
        ("", "vqb", "unknown task 'vqb'; known are vqa"),
    ],
)
def test_bad_input_is_named(tmp_path, content, tasks, said):
    (tmp_path / "vqa_test.jsonl").write_text(content)
    with pytest.raises(ValueError, match=said):
        read_questions(tmp_path, "test", (tasks,))


@pytest.mark.parametrize("cut", ['{"sample_id": "c", "mis', '{"sample_id": "c", "missing": false}'])
def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path, cut):
    path = tmp_path / "results.jsonl"
    whole = '{"sample_id": "a", "missing": false}\n{"sample_id": "b", "missing": false}\n'
    path.write_text(whole + cut)
    assert set(evaluate.read_rows(path)) == {"a", "b"}
    assert path.read_text() == whole


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "results.jsonl").write_text('{"sample_id\n{"sample_id": "b"}\n')
    with pytest.raises(ValueError, match=r"results\.jsonl:1"):
        evaluate.read_rows(tmp_path / "results.jsonl")


def _question(number):
    return Question(
        sample_id=f"vqa-{number}",
        task="vqa",
        main_task_type="vqa",
        sub_task_type="",
        text=str(number),
        answer="yes",
    )


@pytest.fixture
def fake_model(monkeypatch):
    """Answers every question rightly but gives one output too few for a batch that holds question 5."""
    asked = []

    def ask(model, batch, args):
        asked.append([q.sample_id for q in batch])
        return [Output(text="Yes ")] * (len(batch) - ("vqa-5" in asked[-1]))

    module = SimpleNamespace(Inferencer=SimpleNamespace(from_model_dir=lambda *a, **k: None))
    monkeypatch.setitem(evaluate.sys.modules, "inference_pipeline.inferencer", module)
    monkeypatch.setattr(evaluate, "ASK", {"vqa": ask})
    return asked


def _args(directory, **changed):
    defaults = {"output_dir": directory, "shard": 0, "num_shards": 1, "batch_size": 2, "weights": "ema"}
    return argparse.Namespace(
        **defaults | {"model_path": Path("model"), "device": "cpu", "adapter": None} | changed
    )


def test_resume_goes_on_and_two_shards_give_what_one_gives(tmp_path, fake_model):
    questions, rules = [_question(i) for i in range(6)], Rules(judge=None)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    evaluate.evaluate(questions, rules, _args(one))
    lines = (one / "results.jsonl").read_text().splitlines(keepends=True)
    (one / "results.jsonl").write_text("".join(lines[:3]) + lines[3][:9])
    fake_model.clear()
    evaluate.evaluate(questions, rules, _args(one))
    assert fake_model == [["vqa-2", "vqa-3"], ["vqa-4", "vqa-5"]]

    for shard in range(2):
        evaluate.evaluate(questions[shard::2], rules, _args(two, shard=shard, num_shards=2))
    first, second = (evaluate.write_statistics(questions, rules, d, {}) for d in (one, two))
    assert first["vqa_exact"] == second["vqa_exact"] == pytest.approx(5 / 6, abs=1e-6)
    assert first["overall"]["missing_outputs"] == 1 and first["n"]["vqa_exact"] == 6


def test_merging_counts_what_no_part_holds(tmp_path, capsys):
    statistics = evaluate.write_statistics([_question(i) for i in range(4)], Rules(judge=None), tmp_path, {})
    assert statistics["vqa_exact"] == 0.0 and statistics["overall"]["missing_outputs"] == 4
    assert "4 samples have no output" in capsys.readouterr().err
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 4


def test_results_made_otherwise_are_not_mixed(tmp_path):
    def arguments(*extra):
        flags = ["--model_path", str(tmp_path), "--data_dir", "d", "--output_dir", str(tmp_path)]
        return evaluate.parse_args([*flags, *extra])

    (tmp_path / "ema.safetensors").touch()
    evaluate.pin_settings(arguments("--shard", "0", "--num_shards", "2"))
    evaluate.pin_settings(arguments("--shard", "1", "--num_shards", "2"))
    with pytest.raises(ValueError, match="seed 0, now it is 1; remove"):
        evaluate.pin_settings(arguments("--seed", "1"))


def test_a_model_directory_without_weights_leaves_nothing_behind_that_refuses_the_right_one(tmp_path, capsys):
    message = [{"from": "human", "value": "1 + 1"}, {"from": "gpt", "value": "2"}]
    row = {"main_task_type": "text", "sub_task_type": "sum", "message": message}
    (tmp_path / "text_test.jsonl").write_text(json.dumps(row) + "\n")
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    flags = [
        "--model_path",
        str(model),
        "--data_dir",
        str(tmp_path),
        "--output_dir",
        str(out),
        "--tasks",
        "text",
    ]
    assert evaluate.main(flags) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {model}/ema.safetensors: no weights here")
    assert not (out / "evaluation_settings.json").exists()

    (model / "ema.safetensors").touch()
    assert evaluate.pin_settings(evaluate.parse_args(flags))["weights_modified"] > 0


def test_results_with_adapters_are_named_and_pinned_by_them(tmp_path):
    run = tmp_path / "adapted" / "adapter"
    (run / "ema").mkdir(parents=True)
    (run / "ema" / "adapter_config.json").write_text("{}")
    flags = ["--model_path", str(tmp_path / "base"), "--adapter", str(run), "--data_dir", "d"]
    args = evaluate.parse_args([*flags, "--output_dir", str(tmp_path)])
    with pytest.raises(ValueError, match=r"adapter/ema/adapter_model.safetensors: no weights here"):
        evaluate.pin_settings(args)
    (run / "ema" / "adapter_model.safetensors").touch()
    settings = evaluate.pin_settings(args)
    assert settings["model_id"] == "base+adapted"
    assert evaluate.pin_settings(args) == settings
    os.utime(run / "ema" / "adapter_model.safetensors", ns=(1, 1))
    with pytest.raises(ValueError, match="holds results with weights_modified"):
        evaluate.pin_settings(args)
