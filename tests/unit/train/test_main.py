"""What `train/main.py` makes of flags before anything is built."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.unit.data.toy_groups import NumberDataset, group
from tests.unit.modeling.tiny import tiny_config
from train.config import build_args
from train.main import for_training, require_heads


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


@pytest.mark.parametrize(
    ("asked", "rest"), [(("box",), ""), (("box", "mask"), r", set its box_templates: \[\]")]
)
def test_a_mixture_that_asks_for_boxes_is_refused_by_a_model_without_a_head_for_them(
    asked: tuple[str, ...], rest: str
) -> None:
    dataset = PictureDataset()
    dataset.heads = asked
    config, groups = tiny_config(), [replace(group("refer", [3]), dataset=dataset)]
    require_heads(config, groups, Path("model"))
    with pytest.raises(
        ValueError,
        match="group 'refer': PictureDataset asks for what the model has no head for: box .model/bagel_config.json names its "
        f"heads: mask.; take the group out of the mixture{rest}, or start from a model that has them",
    ):
        require_heads(replace(config, heads={"mask": {}}), groups, Path("model"))
