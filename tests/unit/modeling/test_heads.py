"""Entries of `heads` in bagel_config.json: which implementation, and what is wrong with an entry."""

import re
from dataclasses import replace
from typing import Any

import pytest

from modeling.heads import HEADS, build_head, head_class
from tests.unit.modeling.tiny import tiny_config


def test_the_type_of_a_prediction_is_its_own_name_unless_said() -> None:
    assert head_class("mask", {}) is head_class("mask", {"type": "mask"}) is HEADS["mask"]
    head = build_head("mask", {"type": "mask", "channels": 4}, hidden_size=8, grid_size=8, patch_size=4)
    assert head.mix.out_channels == 4


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (
            {"mask": {"type": "sman"}},
            "heads.mask: no head of type 'sman'; known types are mask, sam, autoencoder",
        ),
        ({"masks": {}}, "heads.masks: no head of type 'masks'; known types are"),
        ({"box": {"type": "mask"}}, "heads.box: type 'mask' predicts 'mask'; 'box' has box, embedding"),
        (
            {"mask": {"chanels": 3}},
            "heads.mask: type 'mask' has no option 'chanels'; did you mean 'channels'?",
        ),
        ({"mask": {"patch_size": 3}}, "heads.mask: type 'mask' has no option 'patch_size'"),
    ],
)
def test_what_is_wrong_with_an_entry_is_named(heads: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(tiny_config(), heads=heads)
