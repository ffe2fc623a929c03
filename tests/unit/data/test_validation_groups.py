"""`val:` in a mixture: what its groups take over from the training groups of their names."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data.mixture import GroupSpec, load_mixture, load_validation
from tests.unit.data.test_mixture import REGISTRY, VIT


def mixture(folder: Path, **content: Any) -> Path:
    (folder / "a.jsonl").write_text(json.dumps({"i": 1}) + "\n")
    places = {name: {"jsonl_path": "a.jsonl"} for name in ("a", "held_out")}
    file = folder / "mix.yaml"
    file.write_text(
        yaml.safe_dump({"dataset_info": {"talk": places, "look": places}, **content}, sort_keys=False)
    )
    return file


def validation(file: Path, **rest: bool) -> dict[str, GroupSpec]:
    return {spec.name: spec for spec in load_validation(file, REGISTRY, {}, **rest)}


TALK = {"dataset_names": ["a"], "turns": 4, "weight": 7, "num_used_data": [1], "is_mandatory": True}
SEEN = {"type": "look", "dataset_names": ["a"], "vit_image_transform_args": VIT}


def test_a_group_takes_over_how_but_not_what(tmp_path: Path) -> None:
    own = {"talk": {"dataset_names": ["held_out"]}, "pictures": {"dataset_names": ["held_out"], "weight": 2}}
    file = mixture(tmp_path, talk=TALK, pictures=SEEN, val=own)
    assert [spec.name for spec in load_mixture(file, REGISTRY, {})] == ["talk", "pictures"]
    found = validation(file)
    talk, pictures = found["talk"], found["pictures"]
    assert talk.options == {"turns": 4} and talk.sources[0].dataset == "held_out"
    assert (talk.weight, talk.is_mandatory, talk.sources[0].end) == (1.0, False, None)
    assert pictures.vit_transform == VIT and pictures.weight == 2.0
    assert {(spec.when_exhausted, spec.epochs) for spec in found.values()} == {("drop", 1)}


def test_a_group_may_say_everything_itself(tmp_path: Path) -> None:
    other = {"type": "talk", "dataset_names": ["held_out"], "turns": 2, "when_exhausted": "repeat"}
    (found,) = validation(mixture(tmp_path, talk=TALK, val={"other": other})).values()
    assert (found.options, found.when_exhausted, found.epochs) == ({"turns": 2}, "repeat", None)


def test_a_file_of_its_own_and_none_at_all(tmp_path: Path) -> None:
    file = mixture(tmp_path, talk=TALK)
    assert validation(file) == {}
    assert validation(file, separate=True)["talk"].weight == 7.0


@pytest.mark.parametrize(
    ("val", "message"),
    [
        ({"talk": {"dataset_names": ["b"]}}, "nothing says where 'b' is"),
        ({"tlk": {"dataset_names": ["a"]}}, "no dataset class 'tlk'"),
        (["talk"], "val: expected groups such as"),
        ({"talk": 3}, "talk: expected keys such as 'dataset_names'"),
    ],
)
def test_groups_that_cannot_be(val: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        validation(mixture(tmp_path, talk=TALK, val=val))
