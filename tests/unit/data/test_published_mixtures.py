"""Published mixture YAMLs, as their owners have them, give the groups that the published code makes of them."""

import io
import json
import logging
from pathlib import Path

import pytest
import yaml
from PIL import Image

from data.dataset_info import DATASET_REGISTRY
from data.layout import LayoutSpec
from data.mixture import GroupSpec, build_groups, load_mixture
from data.policy import PackBudget
from data.stream import StreamPlan, make_sample
from data.types import Sample

MIXTURES = Path(__file__).parents[2] / "golden" / "mixtures"


def places(file: Path) -> dict:
    """Every name of a mixture at a place of the published form, as `DATASET_INFO` has it."""
    info: dict = {}
    for kind, entry in yaml.safe_load(file.read_text()).items():
        names = entry["dataset_names"]
        for name in names if isinstance(names, list) else sum(names.values(), []):
            # Published places of Parquet files have the folder only.
            path = (
                {"num_files": 10, "num_total_samples": 1000}
                if DATASET_REGISTRY[kind].source_format == "parquet"
                else {"jsonl_path": f"/data/{name}.jsonl"}
            )
            info.setdefault(kind, {})[name] = {"data_dir": f"/data/{name}", **path}
    info.get("unified_edit", {}).get("seedxedit_multi", {})["parquet_info_path"] = "/data/info.json"
    return info


def load(name: str) -> dict[str, GroupSpec]:
    file = MIXTURES / f"{name}.yaml"
    return {spec.name: spec for spec in load_mixture(file, info=places(file))}


def used(spec: GroupSpec) -> list[tuple[str, int, int | None]]:
    return [(s.dataset, s.start, s.end) for s in spec.sources]


def test_bagel():
    groups = load("bagel")
    assert [(g.name, g.dataset_class.__name__, g.weight, g.is_mandatory) for g in groups.values()] == [
        ("t2i_pretrain", "ParquetT2iDataset", 1.0, True),
        ("unified_edit", "StepsDataset", 1.0, False),
        ("vlm_sft", "VlmDataset", 1.0, True),
    ]
    assert used(groups["t2i_pretrain"]) == [("t2i", 0, 10)]
    (edit,) = groups["unified_edit"].sources
    assert edit.path_key == "data_dir" and edit.location["parquet_info_path"] == "/data/info.json"
    sft = groups["vlm_sft"]
    assert sft.options == {"frame_sampler_args": {"max_num_frames": 12, "min_num_frames": 8}}
    # `image_transform_args` of this class is the ViT's.
    assert sft.vae_transform is None and sft.vit_transform["max_pixels"] == 2_007_040
    assert [(s.end, s.shuffle_seed) for s in sft.sources] == [(1000, 0)]
    assert groups["unified_edit"].vae_transform["image_stride"] == 16
    assert groups["unified_edit"].vit_transform["image_stride"] == 14


def test_unimedvl(caplog):
    caplog.set_level(logging.INFO, "data.mixture")
    groups = load("unimedvl")
    assert {g.name: g.weight for g in groups.values()} == {
        "SftJSONLIterableDataset_Ver1_vqa": 5.0,
        "SftJSONLIterableDataset_Ver1_report": 2.5,
        "SftJSONLIterableDataset_with_VisualReconstruction_Ver2": 1.0,
        "SftJSONLIterableDataset_TextOnly_instructions": 0.5,
        "SftJSONLIterableDataset_TextOnly_exams": 0.5,
        "MedicalImageEditingIterableDataset_ver1": 1.0,
        "CounterfactualMedicalIterableDataset_ver1_chest": 1.0,
        "T2IIterableDataset_Ver1": 1.0,
    }
    vqa = groups["SftJSONLIterableDataset_Ver1_vqa"]
    # Two numbers for two names are counts, not a range, and the log says so.
    assert used(vqa) == [("pathology_vqa", 0, None), ("radiology_vqa", 0, 5000)]
    assert "num_used_data: [0, 5000] is read as how many records of each data set, 0 = all" in caplog.text
    assert vqa.is_mandatory and {s.shuffle_seed for s in vqa.sources} == {42}
    assert vqa.vit_transform["image_stride"] == 14
    assert (
        "image_transform_args: not used, SftJSONLIterableDataset_Ver1 needs no pictures for the VAE"
        in caplog.text
    )
    assert used(groups["SftJSONLIterableDataset_TextOnly_exams"]) == [
        ("exam_questions", 0, 500),
        ("exam_answers", 0, 500),
    ]
    assert "resume_data_status" not in caplog.text, "true is what happens"


def test_medq():
    (group,) = load("medq").values()
    assert (group.name, group.weight) == ("MedicalImageEditingIterableDataset_ver1_stage1_medq_unif", 20.0)
    assert group.is_mandatory and len(group.sources) == 6
    assert {(s.start, s.end, s.shuffle_seed) for s in group.sources} == {(0, None, 42)}
    assert group.vae_transform == {"image_stride": 16, "max_image_size": 1024, "min_image_size": 256}
    assert group.sources[1].location == {
        "data_dir": "/data/UDPET_train",
        "jsonl_path": "/data/UDPET_train.jsonl",
    }


@pytest.mark.parametrize("name", [f.stem for f in sorted(MIXTURES.glob("*.yaml"))])
def test_a_key_that_nobody_reads_is_named(name, tmp_path):
    file = MIXTURES / f"{name}.yaml"
    content = yaml.safe_load(file.read_text())
    for kind in content:
        broken = {**content, kind: {**content[kind], "num_used_dat": [1]}}
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump(broken))
        with pytest.raises(
            ValueError, match=f"{kind}: unknown key 'num_used_dat'; did you mean 'num_used_data'"
        ):
            load_mixture(tmp_path / "mix.yaml", info=places(file))


def test_every_published_class_has_its_name():
    published = {
        "vlm_sft", "t2i_pretrain", "unified_edit", "SftJSONLIterableDataset_Ver1",
        "SftJSONLIterableDataset_with_VisualReconstruction_Ver1", "SftJSONLIterableDataset_with_VisualReconstruction_Ver2",
        "SftJSONLIterableDataset_TextOnly", "MedicalImageEditingIterableDataset_ver1",
        "CounterfactualMedicalIterableDataset_ver1", "T2IIterableDataset_Ver1",
    }  # fmt: skip
    assert published <= set(DATASET_REGISTRY)


# --------------------------------------------------------------------------------------- from the file to the sample


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def said(*texts: str) -> list[dict]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


TALK = {"input_img": [{"path": "/a.png", "height": 32, "width": 32}], "message": said("<image> q", "a")}
PAIR = {**TALK, "output_img": [{"path": "b.png"}], "main_task_type": "restoration"}
JSONL_ROWS = {
    "vlm_sft": [
        {"image": "a.png", "conversations": said("<image>\nq", "a")},
        {"video": "clip/", "conversations": said("<video> q", "a")},
    ],
    "SftJSONLIterableDataset_Ver1": [TALK],
    "SftJSONLIterableDataset_with_VisualReconstruction_Ver1": [TALK],
    "SftJSONLIterableDataset_with_VisualReconstruction_Ver2": [TALK],
    "SftJSONLIterableDataset_TextOnly": [TALK],
    "MedicalImageEditingIterableDataset_ver1": [PAIR],
    "CounterfactualMedicalIterableDataset_ver1": [PAIR],
    "T2IIterableDataset_Ver1": [PAIR, TALK],
}  # fmt: skip
PARQUET_COLUMNS = {
    "t2i_pretrain": {"image": [png(1), png(2)], "captions": ['{"a": "x", "b": "y"}'] * 2},
    "unified_edit": {
        "image_list": [[png(1), png(2), png(3)]],
        "instruction_list": [[["make it 2", "to 2"], ["make it 3"]]],
    },
}


def write_data(folder: Path, kind: str) -> dict[str, str]:
    """One data set of published rows in the published places; gives its location."""
    for name in ("a.png", "b.png"):
        (folder / name).write_bytes(png(7))
    (folder / "clip").mkdir()
    for n in range(3):
        Image.new("RGB", (32, 32)).save(folder / "clip" / f"frame_{n}.jpg")
    if kind in JSONL_ROWS:
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in JSONL_ROWS[kind]))
        return {"data_dir": ".", "jsonl_path": "rows.jsonl"}
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    parquet.write_table(arrow.table(PARQUET_COLUMNS[kind]), folder / "rows.parquet")
    if kind == "t2i_pretrain":
        return {"data_dir": "."}
    (folder / "info.json").write_text(json.dumps({"/elsewhere/rows.parquet": {"num_row_groups": 1}}))
    return {"data_dir": ".", "parquet_info_path": "info.json"}


@pytest.mark.parametrize("kind", [*JSONL_ROWS, *PARQUET_COLUMNS])
@pytest.mark.parametrize("as_published", [False, True])
def test_published_rows_become_samples(tmp_path, tokenizer, kind, as_published):
    transform = {"image_stride": 16, "max_image_size": 32, "min_image_size": 32}
    entry = {
        "dataset_names": {"part": ["mine"]},
        "num_used_data": {"part": [0]},
        "upstream_compat": as_published,
        "image_transform_args": transform,
        "vit_image_transform_args": {**transform, "image_stride": 8},
    }
    if kind == "vlm_sft":
        entry |= {
            "image_transform_args": entry.pop("vit_image_transform_args"),
            "frame_sampler_args": {"max_num_frames": 8},
        }
    content = {"dataset_info": {kind: {"mine": write_data(tmp_path, kind)}}, kind: entry}
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(content))
    groups = build_groups(load_mixture(tmp_path / "mix.yaml"), tokenizer)
    budget = PackBudget(expected=1000, maximum=2000, per_sample=1000)
    layout = LayoutSpec(vit_patch_size=8, latent_stride=16)
    plan = StreamPlan(groups=groups, layout=layout, special=tokenizer.special, budget=budget, seed=1)
    (group,) = groups
    assert group.name == f"{kind}_part" and len(group.source) == len(
        (JSONL_ROWS | {"t2i_pretrain": "12"}).get(kind, "1")
    )
    for position in range(3):
        made = make_sample(plan, group, 0, position)
        assert isinstance(made, Sample), made
