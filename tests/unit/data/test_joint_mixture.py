"""One YAML of everything: questions, drawing, editing, detection, boxes and masks share a pack, each loss with its own count."""

import json

import numpy as np
import pytest
import yaml
from PIL import Image

from data.mixture import build_groups, load_mixture
from data.policy import PackBudget
from data.stream import LaneStream, StreamPlan
from data.types import LaneCursor
from tests.unit.modeling.tiny import SPEC
from train.objective import Objective

VIT = {"image_stride": 8, "max_image_size": 32, "min_image_size": 32}
VAE = {"image_stride": 16, "max_image_size": 32, "min_image_size": 32}
RLE = {"size": [64, 64], "counts": [64 * 16, 64 * 16, 64 * 32]}


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


ROWS = {
    "vlm_sft": {"input_img": ["a.png"], "message": said("<image>How many?", "Two.")},
    "T2IIterableDataset_Ver1": {"output_img": ["b.png"], "message": said("Draw a 7.", "<image>")},
    "edit_jsonl": {"input_img": ["a.png"], "output_img": ["b.png"], "message": said("Paint it. <image>", "<image>")},
    "refer_jsonl": {"img_path": "a.png", "expression": "the 7", "bbox": [8, 8, 40, 40], "mask": RLE},
    "grounding_jsonl": {"img_path": "b.png", "expression": "the 3", "bbox": [0, 0, 32, 64]},
    "medical_jsonl": {"image": "a.png", "labels": ["cyst"] * 2, "masks": [RLE] * 2, "modality": "CT"},
    "detection_jsonl": {
        "images": ["a.png"], "width": 64, "height": 64,
        "objects": [{"bbox_2d": [0, 0, 9, 9], "label": "a 7"}, {"bbox_2d": [9, 9, 40, 40], "label": "a 3"}],
    },
}  # fmt: skip
OPTIONS = {
    "refer_jsonl": {"augment": {"flip": 0.5, "rotate": True}},
    "grounding_jsonl": {"box_format": "token"},
    "medical_jsonl": {"box_templates": []},
    "vlm_sft": {"augment": {"crop": [0.5, 1.0]}},
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory, tokenizer):
    """The first pack of a mixture with a mandatory group of each kind."""
    folder = tmp_path_factory.mktemp("joint")
    rng = np.random.default_rng(0)
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / name)
    mixture: dict = {"dataset_info": {}}
    for kind, row in ROWS.items():
        (folder / f"{kind}.jsonl").write_text(json.dumps(row) + "\n")
        mixture["dataset_info"][kind] = {kind: {"jsonl_path": f"{kind}.jsonl"}}
        mixture[kind] = {
            "dataset_names": [kind], "weight": 1.0, "is_mandatory": True, "vit_image_transform_args": VIT,
            "image_transform_args": VAE, **OPTIONS.get(kind, {}),
        }  # fmt: skip
    for kind in ("vlm_sft", "refer_jsonl", "grounding_jsonl", "medical_jsonl", "detection_jsonl"):
        del mixture[kind]["image_transform_args"]
    del mixture["T2IIterableDataset_Ver1"]["vit_image_transform_args"]
    (folder / "joint.yaml").write_text(yaml.safe_dump(mixture))
    plan = StreamPlan(
        groups=build_groups(load_mixture(folder / "joint.yaml"), tokenizer, folder),
        layout=SPEC,
        special=tokenizer.special,
        budget=PackBudget(expected=1, maximum=4096, per_sample=2048),
        seed=0,
        num_lanes=1,
    )
    pack = LaneStream(plan, LaneCursor(lane=0)).next_pack()
    assert not pack.rejects, [reject.message for reject in pack.rejects]
    return pack


def of(pack, *kinds: str) -> int:
    """How many samples of these groups the pack has."""
    return sum(origin.group in kinds for origin in pack.origins)


def test_one_pack_holds_every_kind_of_sample(pack):
    assert {origin.group for origin in pack.origins} == set(ROWS)
    assert {head: len(r.anchor) for head, r in pack.regions.items()} == {
        "box": of(pack, "refer_jsonl", "grounding_jsonl"),
        "mask": of(pack, "refer_jsonl", "medical_jsonl"),
        "detr": of(pack, "detection_jsonl"),
    }
    assert set(pack.regions["detr"].num_boxes.tolist()) == {2}
    assert len(pack.und_hw) == len(pack.origins) - of(pack, "T2IIterableDataset_Ver1")
    assert len(pack.gen_hw) == of(pack, "T2IIterableDataset_Ver1") + 2 * of(pack, "edit_jsonl")


def test_every_loss_has_a_count_of_its_own(pack):
    names = ("ce", "mse", "box_l1", "box_giou", "mask_bce", "mask_dice", "det_l1", "det_giou")
    counts = dict(zip(names, Objective(dict.fromkeys(names, 1.0)).counts(pack).tolist(), strict=True))
    boxes, masks = of(pack, "refer_jsonl", "grounding_jsonl"), of(pack, "refer_jsonl", "medical_jsonl")
    assert counts["ce"] == len(pack.label_ids) and counts["mse"] > 0
    assert counts["box_l1"] == counts["box_giou"] == boxes
    assert counts["mask_bce"] == counts["mask_dice"] == masks
    assert counts["det_l1"] == counts["det_giou"] == 2 * of(pack, "detection_jsonl")
    assert len({counts["ce"], boxes, 2 * of(pack, "detection_jsonl")}) == 3
