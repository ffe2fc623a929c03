"""What `train/main.py` makes of flags before anything is built."""

from dataclasses import replace

import pytest

from tests.unit.data.toy_groups import NumberDataset, group
from tests.unit.modeling.tiny import tiny_config
from train.config import build_args
from train.main import for_training


class PictureDataset(NumberDataset):
    needs = ("vit",)


def test_freeze_und_is_taken_from_the_flag_or_the_files() -> None:
    config = tiny_config()
    assert for_training(config, build_args({}), ()) == config
    assert for_training(config, build_args({"freeze_und": True}), [group("text", [3])]).llm.freeze_und
    assert for_training(tiny_config(freeze_und=True), build_args({}), ()).llm.freeze_und


def test_a_mixture_that_needs_what_is_left_out_is_refused() -> None:
    pictures = replace(group("vqa", [3]), dataset=PictureDataset())
    for_training(tiny_config(), build_args({"visual_gen": False}), [pictures])
    with pytest.raises(
        ValueError, match="group 'vqa': PictureDataset needs the VIT, which --visual_und False leaves out"
    ):
        for_training(tiny_config(), build_args({"visual_und": False}), [pictures])
