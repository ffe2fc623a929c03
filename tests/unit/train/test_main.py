"""What `train/main.py` makes of flags before anything is built."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from data.dataset_base import TaskDataset
from data.interleave_datasets.edit import EditDataset
from data.mixture import Group
from data.sources import JsonlSource
from data.tokens import Tokenizer
from data.transforms import LongestSide
from data.vlm_dataset import VlmDataset
from tests.unit.data.toy_groups import NumberDataset, group
from tests.unit.modeling.tiny import mask_config, tiny_config
from train.config import build_args
from train.main import for_training, require_heads, sharding


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


def test_a_head_with_an_encoder_of_its_own_wants_its_view() -> None:
    dataset = PictureDataset()
    dataset.heads = ("mask",)
    groups = [replace(group("refer", [3]), dataset=dataset)]
    with pytest.raises(
        ValueError, match="group 'refer': the mask head has an image encoder of its own.*head_image_transform"
    ):
        require_heads(mask_config("separate"), groups, Path("model"))
    dataset.head_transform = LongestSide(32)
    require_heads(mask_config("separate"), groups, Path("model"))


def test_a_group_with_more_objects_than_the_head_has_queries_is_refused() -> None:
    dataset = PictureDataset()
    dataset.heads, dataset.max_objects = ("detr",), 6
    groups = [replace(group("find", [3]), dataset=dataset)]
    config = tiny_config()
    with pytest.raises(
        ValueError, match="group 'find': max_objects 6 is more than the detr head can find, 5"
    ):
        require_heads(config, groups, Path("model"))
    require_heads(replace(config, heads={"detr": {}}), groups, Path("model"))


def rows_with_objects(
    tmp_path: Path, tokenizer: Tokenizer, kind: type[TaskDataset], *extra: dict[str, object]
) -> Group:
    """A group of 200 rows without objects, the `extra` ones among them."""
    talk = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "There."}]
    rows = [{"message": talk, "input_img": "a.png", "output_img": "b.png"}] * 199
    rows[6:6] = [{**rows[0], **row} for row in extra]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return replace(group("talk", [1]), dataset=kind(tokenizer=tokenizer), source=JsonlSource(file))


POINTING = {
    "message": [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "<SEG> and <BOX>"}],
    "objects": {"ref": ["x"]},
}


@pytest.mark.parametrize("kind", [VlmDataset, EditDataset])
def test_a_row_with_objects_is_refused_before_training_by_a_model_without_their_head(
    kind: type[TaskDataset], tmp_path: Path, tokenizer: Tokenizer
) -> None:
    config = tiny_config()
    pointing = rows_with_objects(tmp_path, tokenizer, kind, POINTING, {"message": "no row"})
    require_heads(config, [pointing], Path("model"))
    with pytest.raises(
        ValueError,
        match=rf"group 'talk': {tmp_path}/rows.jsonl:7 asks for what the model has no head for: box .model/bagel_config.json "
        r"names its heads: mask.; remove the row's objects and their <BOX>, take the group out of the mixture, or start from",
    ):
        require_heads(replace(config, heads={"mask": {}}), [pointing], Path("model"))


def test_rows_without_objects_need_no_head(tmp_path: Path, tokenizer: Tokenizer) -> None:
    words = {**POINTING, "objects": None}  # rejected, and told, when its turn comes
    require_heads(
        replace(tiny_config(), heads={}),
        [rows_with_objects(tmp_path, tokenizer, VlmDataset, words)],
        Path("model"),
    )


def test_what_print_config_says_of_sharding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sharding(build_args({"model_path": str(tmp_path)})).startswith(f"no shard plan: {tmp_path}")
    for name, config in (
        ("llm_config", {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
                        "num_key_value_heads": 2, "vocab_size": 64}),
        ("vit_config", {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                        "patch_size": 8, "image_size": 64}),
        ("bagel_config", {}),
    ):  # fmt: skip
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
    monkeypatch.setenv("WORLD_SIZE", "4")
    flags = {"model_path": str(tmp_path), "from_scratch": True, "min_unit_params": 0, "num_replicate": 2}
    told = sharding(build_args(flags))
    assert "HYBRID_SHARD, 2 x 2 ranks" in told and "language_model.model.layers.0-2" in told, told
    told = sharding(build_args({**flags, "num_replicate": 3}))
    assert told.startswith("no shard plan: --sharding_strategy HYBRID_SHARD with --num_replicate 3")
