"""What a person sees who gets something wrong: the trainer on two ranks ends (or skips) with one line that says what to do.

A run costs some five seconds, so records that are skipped share one run, and the others fail as early as they can.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import ROOT, Done, run_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

Row = dict[str, Any]


def question(text: str = "2 + 3 = ?") -> Row:
    return {"message": [{"from": "human", "value": text}, {"from": "gpt", "value": "5"}]}


def write_rows(file: Path, *rows: Row | str) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def text_mixture(folder: Path, **group: object) -> Path:
    """`mixture.yaml` with one group of four good lines, changed by `group`."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "text.jsonl", *[question()] * 4)
    entry = {"dataset_names": ["sums"], "weight": 1.0, **group}
    content = {
        "dataset_info": {
            "text_only": {"sums": {"jsonl_path": "text.jsonl"}, "gone": {"jsonl_path": "gone.jsonl"}}
        },
        "text_only": {key: value for key, value in entry.items() if value is not None},
    }
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


def train(quickstart: Quickstart, folder: Path, **flags: object) -> Done:
    if "dataset_config_file" not in flags:
        flags["dataset_config_file"] = text_mixture(folder)
    return run_trainer(folder, **{"model_path": quickstart.model, "results_dir": folder / "results", **flags})


def assert_one_line(done: Done, pattern: str) -> None:
    """Exit code 1, our one line (rank 1 may say the same), and no stack of ours for the person to dig through."""
    assert done.code == 1, done.output
    said = {
        found[2]
        for line in done.output.splitlines()
        if (found := re.match(r"(\[rank \d+\] )?(error: .*)", line))
    }
    assert len(said) == 1, done.output
    assert re.fullmatch(f"error: {pattern}", said.pop()), done.output
    assert not done.lines(f'File "{ROOT}/train') + done.lines(f'File "{ROOT}/data'), done.output


# --------------------------------------------------------------------------------------------- ends before it begins

Prepare = Callable[[Quickstart, Path], dict[str, object]]


def unknown_key(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"dataset_config_file": text_mixture(folder, wieght=2.0)}


def missing_key(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"dataset_config_file": text_mixture(folder, dataset_names=None)}


def unknown_dataset(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"dataset_config_file": text_mixture(folder, dataset_names=["suns"])}


def missing_file(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"dataset_config_file": text_mixture(folder, dataset_names=["gone"])}


def empty_dataset(_: Quickstart, folder: Path) -> dict[str, object]:
    mixture = text_mixture(folder)
    write_rows(folder / "text.jsonl")
    return {"dataset_config_file": mixture}


def output_not_writable(_: Quickstart, folder: Path) -> dict[str, object]:
    (folder / "a_file").write_text("")  # below a file nobody can write, not even root
    return {"results_dir": folder / "a_file" / "results"}


def flag_typo(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"expected_num_tokns": 500}


def contradicting_budgets(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"expected_num_tokens": 800}


def no_weights(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"from_scratch": False}


def damaged_autoencoder(quickstart: Quickstart, folder: Path) -> dict[str, object]:
    shutil.copytree(quickstart.model, folder / "model")
    file = folder / "model" / "ae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return {"model_path": folder / "model"}


def missing_head(quickstart: Quickstart, folder: Path) -> dict[str, object]:
    shutil.copytree(quickstart.model, folder / "model")
    file = folder / "model" / "bagel_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "heads": {"mask": {"channels": 8}}}))
    return {"model_path": folder / "model", "dataset_config_file": quickstart.mixture}


def lanes_and_ranks(_: Quickstart, folder: Path) -> dict[str, object]:
    return {"num_lanes": 1}


def too_many_bad_records(_: Quickstart, folder: Path) -> dict[str, object]:
    mixture = text_mixture(folder)
    write_rows(folder / "text.jsonl", question(), '{"message": [{"from": "hum', question())
    return {"dataset_config_file": mixture}


ENDS: dict[Prepare, str] = {
    unknown_key: r"{folder}/mixture\.yaml: text_only: unknown key 'wieght'; did you mean 'weight'\?",
    missing_key: r"{folder}/mixture\.yaml: text_only: the key 'dataset_names' is missing; text_only needs it, add it here",
    unknown_dataset: r"{folder}/mixture\.yaml: text_only\.dataset_names: nothing says where 'suns' is; did you mean 'sums'\?; "
    r"add dataset_info\.text_only\.suns to the YAML",
    missing_file: r"group 'text_only': {folder}/gone\.jsonl: no such file; check 'jsonl_path' in dataset_info",
    empty_dataset: r"group 'text_only': {folder}/text\.jsonl: the data set is empty; "
    r"remove it from dataset_names or give it records",
    output_not_writable: r"{folder}/a_file/results/checkpoints: cannot write here \(.*\); "
    r"choose another --results_dir or --checkpoint_dir",
    flag_typo: r"unknown argument --expected_num_tokns=500; did you mean --expected_num_tokens\?",
    contradicting_budgets: r"--expected_num_tokens 800 is more than --max_num_tokens 700; a pack could never be full",
    no_weights: r".*/base/model\.safetensors: no weights here; train or export a model first, or ask for --from_scratch True",
    missing_head: r"group 'vqa': .*/vqa_train\.jsonl:\d+ asks for what the model has no head for: box "
    r"\({folder}/model/bagel_config\.json names its heads: mask\); remove the row's objects and their <BOX>, take the group out "
    r"of the mixture, or start from a model that has it",
    damaged_autoencoder: r"{folder}/model/ae\.safetensors: cannot be read as safetensors \(.*\); copy it here again",
    lanes_and_ranks: r"1 lanes cannot be dealt to 2 ranks: each needs one; start a new run with a larger --num_lanes",
    too_many_bad_records: r"group 'text_only': 1 records? could not be used, the limit is 0; "
    r"first: {folder}/text\.jsonl:2: not valid JSON \(.*, column 23\); correct or remove the line; "
    r"repair or remove them, or raise --max_reject_fraction",
}


@pytest.mark.parametrize("prepare", ENDS, ids=lambda prepare: prepare.__name__)
def test_it_ends_with_one_line(prepare: Prepare, quickstart: Quickstart, tmp_path: Path) -> None:
    done = train(quickstart, tmp_path, **prepare(quickstart, tmp_path))
    assert_one_line(done, ENDS[prepare].replace("{folder}", re.escape(str(tmp_path))))


# ------------------------------------------------------------------------------------- bad records among good ones

SKIPPED = {
    # reason, where -> what the rejects file says about it
    ("bad_json", "text.jsonl:2"): r"text\.jsonl:2: not valid JSON \(.*\); correct or remove the line",
    (
        "too_long",
        "text.jsonl:4",
    ): r"text\.jsonl:4: \d+ tokens, the budget is 400; raise --max_num_tokens_per_sample",
    (
        "bad_image",
        "vqa.jsonl:2",
    ): r"vqa\.jsonl:2: image '.*\.png' is broken or not an image \(.*\); replace it or remove the record",
    (
        "bad_box",
        "refer.json#image 1",
    ): r"refer\.json#image 1: annotation 1: box .* has no area .*; correct or remove it",
    (
        "mask_size",
        "refer.json#image 2",
    ): r"refer\.json#image 2: annotation 2: mask has \[height, width\] \[32, 64\], "
    r"the picture \[64, 64\]; make it again",
}


def spoilt_mixture(folder: Path) -> Path:
    """Three small data sets; each has good records and bad ones."""
    folder.mkdir()
    for name in ("good", "cut"):
        Image.effect_noise((64, 64), 40).convert("RGB").save(folder / f"{name}.png")
    whole = (folder / "cut.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])

    write_rows(
        folder / "text.jsonl",
        question(),
        '{"message": [{"from": "hum',
        question(),
        question("why? " * 400),
        question(),
    )
    seen = [
        {"input_img": [{"path": f"{name}.png"}], **question("<image>\nHow many?")}
        for name in ("good", "cut", "good")
    ]
    write_rows(folder / "vqa.jsonl", *seen)
    whole_mask = {"size": [64, 64], "counts": [0, 64 * 64]}
    annotations = [
        {"bbox": [8, 8, 16, 16], "segmentation": whole_mask},
        {"bbox": [8, 8, 0, 16], "segmentation": whole_mask},
        {"bbox": [8, 8, 16, 16], "segmentation": {"size": [32, 64], "counts": [0, 32 * 64]}},
    ]
    ids = {
        i: {"id": i, "image_id": i, "category_id": 0, "expressions": ["it"]} for i in range(len(annotations))
    }
    coco = {
        "images": [{"id": i, "file_name": "good.png", "height": 64, "width": 64} for i in ids],
        "categories": [{"id": 0, "name": "thing"}],
        "annotations": [{**ids[i], **annotation} for i, annotation in enumerate(annotations)],
    }
    (folder / "refer.json").write_text(json.dumps(coco))

    vit = {"image_stride": 8, "max_image_size": 64, "min_image_size": 64}
    content = {
        "dataset_info": {
            "text_only": {"text": {"jsonl_path": "text.jsonl"}},
            "vlm_sft": {"vqa": {"jsonl_path": "vqa.jsonl", "data_dir": "."}},
            "refer_coco": {"refer": {"coco_path": "refer.json", "data_dir": "."}},
        },
        "text_only": {"dataset_names": ["text"]},
        "vlm_sft": {"dataset_names": ["vqa"], "vit_image_transform_args": vit},
        "refer_coco": {"dataset_names": ["refer"], "vit_image_transform_args": vit},
    }
    file = folder / "mixture.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def spoilt(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Done]:
    """A run over bad records that may go on: the data's folder, with `results` below it."""
    folder = tmp_path_factory.mktemp("spoilt") / "data"
    mixture = spoilt_mixture(folder)
    return folder, train(
        quickstart, folder, dataset_config_file=mixture, max_reject_fraction=1.0, total_steps=4
    )


def test_bad_records_are_skipped_counted_and_written_down(spoilt: tuple[Path, Done]) -> None:
    folder, done = spoilt
    assert done.code == 0, done.output
    files = sorted((folder / "results").glob("rejects.*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    said = {(row["reason"], Path(row["where"]).name): row["message"] for row in rows}
    assert said.keys() == SKIPPED.keys()
    for key, pattern in SKIPPED.items():
        assert re.match(re.escape(str(folder)) + "/" + pattern, said[key]), said[key]

    ledger = done.lines("read = trained + waiting + rejected")[-1].partition("rejected: ")[2]
    counted = {entry.split()[0]: int(entry.split()[-1]) for entry in ledger.split(" | ")}
    assert counted == Counter(row["group"] for row in rows)

    told = done.lines("could not be used")
    assert told and all(re.search(r"see .*/results/rejects\.\d\.jsonl; first: .+:", line) for line in told), (
        done.output
    )


def test_checkpoints_of_another_run_are_not_overwritten(
    quickstart: Quickstart, spoilt: tuple[Path, Done]
) -> None:
    folder, before = spoilt
    assert before.code == 0, before.output
    done = train(quickstart, folder, dataset_config_file=folder / "mixture.yaml")
    place = re.escape(str(folder / "results" / "checkpoints"))
    assert_one_line(
        done,
        rf"{place}: holds checkpoints of an earlier run up to step 4; continue it with --auto_resume, "
        r"or choose another --results_dir or --checkpoint_dir",
    )


def test_more_workers_than_samples(quickstart: Quickstart, tmp_path: Path) -> None:
    mixture = text_mixture(tmp_path)
    write_rows(tmp_path / "text.jsonl", question())
    done = train(quickstart, tmp_path, dataset_config_file=mixture, num_workers=2, total_steps=3)
    assert done.code == 0, done.output
    assert done.lines("step 3/3")


def test_data_that_is_lost_in_mid_run_costs_no_step(quickstart: Quickstart, tmp_path: Path) -> None:
    mixture = text_mixture(tmp_path)
    rows = [question(f"{i} + 3 = ?") for i in range(2000)]
    data, log = write_rows(tmp_path / "text.jsonl", *rows), tmp_path / "results" / "train_log.jsonl"
    whole = data.read_bytes()

    def cut_short() -> bool:
        if log.exists() and log.read_text().count("\n") >= 3 and data.stat().st_size == len(whole):
            with data.open("r+b") as file:
                file.truncate(100)
        return False

    flags = {"dataset_config_file": mixture, "save_every": 1000, "total_steps": 500}
    done = train(quickstart, tmp_path, **flags, stop=cut_short)
    assert_one_line(
        done,
        rf"{re.escape(str(data))}: ends before byte [\d,]+, it had {len(whole):,} when it was indexed; restore it, or start the "
        "run again to index it anew",
    )
    (saved,) = (tmp_path / "results" / "checkpoints").glob("*")
    assert int(saved.name) == log.read_text().count("\n") >= 3

    data.write_bytes(whole)
    again = train(quickstart, tmp_path, **{**flags, "total_steps": int(saved.name) + 2, "auto_resume": True})
    assert again.code == 0, again.output
    assert again.lines(f"continuing from {saved}")
