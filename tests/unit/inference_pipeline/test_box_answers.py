"""What models write about boxes, whole, loose and cut off anywhere."""

import json

import pytest

from inference_pipeline.box_answers import Found, parse_boxes

SIZE = (100.0, 80.0)
NUT = Found(box=(1, 2, 30, 40), label="nut")


def boxes(text: str, **options) -> list[tuple[float, ...]]:
    return [o.box for o in parse_boxes(text, SIZE, **options).objects]


@pytest.mark.parametrize(
    "text",
    [
        '[{"bbox_2d":[1,2,30,40],"label":"nut"}]',
        'Here it is:\n```json\n[{"bbox_2d": [1, 2, 30, 40], "label": "nut"}]\n```\nGood luck.',
        '{"bbox_2d":[1,2,30,40],"label":" nut "}',
        '{"objects":[{"bbox":[1,2,30,40],"desc":"nut"}]}',
        '{"bbox_2d":[[1,2,30,40]],"name":"nut"}',
        "[{'bbox_2d':[1,2,30,40],'label':'nut'},]",
        "［{bbox_2d：[1，2，30，40], label：“nut”}］",
        "<|object_ref_start|>nut<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|>",
        "<ref> nut </ref><box>(1, 2), (30, 40)</box>",
    ],
)
def test_forms(text: str) -> None:
    parsed = parse_boxes(text, SIZE)
    assert parsed.status == "ok" and parsed.objects == (NUT,) and not parsed.dropped


def test_nothing_is_an_answer_and_nonsense_is_none() -> None:
    assert parse_boxes("[]", SIZE).status == "empty_list"
    for text in ("", "no idea", "[", "{}x{", "[1,2,3]", '[{"bbox_2d":[1,2'):
        assert parse_boxes(text, SIZE).status == "failed" or text == "{}x{", text
        assert not parse_boxes(text, SIZE).objects


def test_four_numbers_near_a_label_are_the_last_resort() -> None:
    parsed = parse_boxes('The nut is at (1, 2, 30, 40), label: "nut".', SIZE)
    assert parsed.status == "recovered_loose" and parsed.objects == (NUT,)


def test_an_answer_cut_anywhere_keeps_every_whole_object() -> None:
    rows = [
        {"bbox_2d": [1, 2, 30, 40], "label": '螺丝/{连接}"正确"'},
        {"bbox_2d": [5, 6, 70, 80], "label": "a ] b"},
        {"bbox_2d": [0, 0, 100, 1], "label": "]}"},
    ]
    text = "```json\n" + json.dumps(rows, ensure_ascii=False) + "\n```"
    ends = [
        text.index(json.dumps(row, ensure_ascii=False)) + len(json.dumps(row, ensure_ascii=False))
        for row in rows
    ]
    last = text.rindex("]") + 1
    for cut in range(len(text) + 1):
        parsed = parse_boxes(text[:cut], SIZE)
        whole = sum(end <= cut for end in ends)
        assert [o.label for o in parsed.objects] == [row["label"] for row in rows[:whole]], text[:cut]
        if whole:
            assert parsed.status == ("ok" if cut >= last else "recovered_truncated"), text[:cut]


def test_special_tokens_cut_off() -> None:
    text = (
        "<|object_ref_start|>nut<|object_ref_end|><|box_start|>(1,2),(30,40)<|box_end|><|object_ref_start|>bo"
    )
    assert parse_boxes(text, SIZE).status == "recovered_truncated"
    assert boxes(text) == [(1, 2, 30, 40)]


def test_boxes_are_mended_or_dropped_and_that_is_told() -> None:
    text = json.dumps(
        [
            {"bbox_2d": [30, 40, 1, 2], "label": "turned"},
            {"bbox_2d": [90, 70, 140, 90], "label": "over"},
            {"bbox_2d": [200, 0, 300, 9], "label": "outside"},
            {"bbox_2d": [1, 2, 3], "label": "three"},
            {"bbox_2d": [1, 1, 1, 5], "label": "thin"},
            {"label": "nowhere"},
            {"bbox_2d": [0, 0, 9, 9], "label": "", "score": 0},
        ]
    )
    parsed = parse_boxes(text, SIZE)
    assert [o.box for o in parsed.objects] == [(1, 2, 30, 40), (90, 70, 100, 80), (0, 0, 9, 9)]
    assert parsed.objects[2].score == 0 and parsed.objects[2].label == "", "0 and '' are values"
    assert len(parsed.dropped) == 7 and "corners changed places" in parsed.dropped[0]


def test_a_model_that_runs_in_circles() -> None:
    parsed = parse_boxes(json.dumps([{"bbox_2d": [1, 2, 30, 40], "label": "nut"}] * 6), SIZE)
    assert parsed.objects == (NUT,) and parsed.dropped == ("5 exact repeats: the model runs in circles",)


def test_rows_before_columns_only_if_asked() -> None:
    text = '[{"box_2d":[2,1,40,30],"label":"nut"}]'
    assert boxes(text) == [] and boxes(text, yxyx=True) == [(1, 2, 30, 40)]
