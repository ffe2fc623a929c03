"""Rows of data sets: what each table reads, and that a row which does not fit is refused by key, value and remedy."""

from dataclasses import fields

import pytest

from data import rows
from data.conversation import Turn
from data.dataset_base import SkipSample
from data.rows import (
    REQUIRED,
    CaptionedRow,
    CaptionRow,
    ChatRow,
    DrawRow,
    EditRow,
    ExpressionRow,
    FindingsRow,
    PhotoRow,
    PictureCaptionRow,
    PictureRow,
    QuestionRow,
    ReasonRow,
    ReferRow,
    ScanRow,
    SceneRow,
    SpotRow,
    StepsRow,
    TalkRow,
    ThingRow,
    read_row,
)

MESSAGES = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
TURNS = (Turn(role="human", text="q"), Turn(role="gpt", text="a"))
FULL = {
    ChatRow: {"message": MESSAGES},
    TalkRow: {"message": MESSAGES, "image": "a.png"},
    EditRow: {"message": MESSAGES, "input_img": [{"path": "a.png"}], "output_img": ["b.png"]},
    DrawRow: {"message": MESSAGES, "output_img": "b.png"},
    CaptionRow: {"caption": "a red 7"},
    CaptionedRow: {"image": "image", "captions": '{"a": "a red 7"}'},
    StepsRow: {"image_list": ["image_list/0", "image_list/1"], "instruction_list": [["x"]]},
    SceneRow: {"image": {"file_name": "a.png"}, "annotations": [{"id": 1}], "categories": {7: {"id": 7}}},
    PhotoRow: {"file_name": "a.png"},
    ThingRow: {"expressions": ["x"], "category_id": 0, "bbox": [1, 2, 3, 4]},
    ReferRow: {"img_path": "a.png", "expression": "x"},
    PictureRow: {"img_path": "a.png"},
    ExpressionRow: {"img_path": "a.png", "expression": "x"},
    QuestionRow: {"img_path": "a.png", "question": "x", "answer": "y"},
    SpotRow: {"img_path": "a.png", "sentence": "x", "boxes_seq": [[0]]},
    PictureCaptionRow: {"img_path": "a.png", "caption": "x"},
    ScanRow: {"file_name": "a.png"},
    FindingsRow: {"labels": ["x"]},
    ReasonRow: {"image": "a.png", "text": "x", "shapes": [{"label": "target", "points": [[1, 2]]}]},
}
"""Table -> a row that fits it, with nothing it could do without but what is tested below."""


def refused(kind, row, what="") -> SkipSample:
    with pytest.raises(SkipSample) as e:
        read_row(kind, row, what)
    return e.value


def test_every_table_is_here():
    tables = {v for v in vars(rows).values() if isinstance(v, type) and v.__name__.endswith("Row")}
    assert tables == set(FULL)


@pytest.mark.parametrize("kind", FULL)
def test_a_row_that_fits_is_read(kind):
    assert read_row(kind, {**FULL[kind], "note": "ours"}) == read_row(kind, FULL[kind])


@pytest.mark.parametrize(("kind", "f"), [(kind, f) for kind in FULL for f in fields(kind)])
def test_every_column_refuses_what_it_cannot_read_by_its_key(kind, f):
    rule = f.metadata["column"]
    if rule.read is rows.as_it_is:
        return  # masks are judged with their picture, categories with their table
    for key in rule.keys:
        others = {k: v for k, v in FULL[kind].items() if k not in rule.keys}
        e = refused(kind, {**others, key: 3.5})
        assert e.reason == rule.reason
        assert e.message.startswith(f"`{key}` ") and "3.5" in e.message
        assert f"it must be {rule.form}" in e.message and "correct the row or remove it" in e.message


@pytest.mark.parametrize(("kind", "f"), [(kind, f) for kind in FULL for f in fields(kind)])
def test_what_is_missing_or_empty_has_its_default_or_is_refused(kind, f):
    rule = f.metadata["column"]
    for nothing in ({}, {rule.keys[0]: None}, {rule.keys[0]: ""}, {rule.keys[0]: []}):
        row = {**{k: v for k, v in FULL[kind].items() if k not in rule.keys}, **nothing}
        if rule.default is REQUIRED:
            e = refused(kind, row, "annotation 5")
            assert e.message.startswith("annotation 5: `") and "is missing or empty" in e.message
            assert all(f"`{key}`" in e.message for key in rule.keys) and e.reason == rule.reason
        else:
            assert getattr(read_row(kind, row), f.name) == rule.default


def test_rows_of_both_spellings_are_read_alike():
    ours, llava = read_row(ChatRow, {"message": MESSAGES}), read_row(ChatRow, {"conversations": MESSAGES})
    assert ours == llava and ours.turns == TURNS


@pytest.mark.parametrize(
    "messages", [[], "q", ["q"], [{"from": "system", "value": "x"}], [{"from": "gpt", "value": None}], {"from": "human"}]
)  # fmt: skip
def test_broken_messages_are_refused(messages):
    assert refused(ChatRow, {"message": messages}).reason == "bad_message"


def test_the_turn_that_is_wrong_is_named():
    e = refused(ChatRow, {"message": [*MESSAGES, {"from": "user", "value": "x"}]})
    assert "`message` has in turn 2 {'from': 'user', 'value': 'x'}" in e.message


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({}, ()),
        ({"image": "a.png"}, ("a.png",)),
        ({"image": ["a.png", "b.png"]}, ("a.png", "b.png")),
        ({"input_img": [{"path": "a.png", "height": 1, "width": 1}], "image": "b.png"}, ("a.png",)),
        ({"input_img": {"path": "a.png"}}, ("a.png",)),
        ({"input_img": []}, ()),
        ({"image": {"bytes": "image", "path": None}}, ("image",)),
    ],
)
def test_picture_names(row, names):
    assert read_row(TalkRow, {"message": MESSAGES, **row}).pictures == names


@pytest.mark.parametrize("row", [{"image": 3}, {"image": [""]}, {"image": [{"file": "a.png"}]}])
def test_broken_picture_names_are_refused(row):
    assert refused(TalkRow, {"message": MESSAGES, **row}).reason == "bad_image_list"


@pytest.mark.parametrize(
    ("captions", "read"),
    [
        (["x", "y"], ("x", "y")),
        ({"a": "x", "b": " "}, ("x",)),
        ('{"a": "x", "b": "y"}', ("x", "y")),
        ('["x"]', ("x",)),
        ("{}", ()),
    ],
)
def test_captions(captions, read):
    assert read_row(CaptionRow, {"captions": captions}).captions == read


def test_lists_of_objects_have_one_length():
    row = {"message": MESSAGES, "objects": {"ref": ["a", "b"], "bbox": [[1, 2, 3, 4]]}}
    e = refused(TalkRow, row)
    assert e.reason == "bad_objects" and "`objects` has ref 2, bbox 1" in e.message
