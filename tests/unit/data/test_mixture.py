import json
from collections.abc import Mapping, Sequence

import pytest
import yaml

from data.dataset_base import TaskDataset
from data.mixture import build_groups, load_mixture, used_ranges
from data.types import Sample


class TalkDataset(TaskDataset):
    """Reads JSONL; `turns` must be given."""

    def __init__(
        self,
        *,
        turns: int,
        shout: bool = False,
        words: Sequence[str | None] = (),
        extra: Mapping[str, float] | None = None,
        **base,
    ):
        super().__init__(**base)
        self.turns, self.shout = turns, shout

    def to_sample(self, record, rng) -> Sample:
        raise NotImplementedError


class LookDataset(TaskDataset):
    """Reads JSONL through the ViT, as the published `vlm_sft`."""

    image_transform_role = "vit"
    needs = ("vit",)

    def to_sample(self, record, rng) -> Sample:
        raise NotImplementedError


REGISTRY = {"talk": TalkDataset, "look": LookDataset}
VIT = {"image_stride": 8, "max_image_size": 64, "min_image_size": 32}


@pytest.fixture
def write(tmp_path):
    """Writes a mixture beside two data sets `a` and `b` of 10 records each."""
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"i": f"{name}{i}"}) + "\n" for i in range(10))
        )
    places = {name: {"jsonl_path": f"{name}.jsonl"} for name in ("a", "b")}

    def write_yaml(**content):
        file = tmp_path / "mix.yaml"
        file.write_text(
            yaml.safe_dump({"dataset_info": {"talk": places, "look": places}, **content}, sort_keys=False)
        )
        return file

    return write_yaml


def load(file, info=None):
    return load_mixture(file, REGISTRY, info or {})


def records(group):
    return [group.source.read(i).data["i"] for i in range(len(group.source))]


def test_the_list_form(write, tmp_path):
    file = write(
        talk={
            "dataset_names": ["a", "b"],
            "weight": 2,
            "num_used_data": [3, 0],
            "turns": 4,
            "is_mandatory": True,
        },
        look={"dataset_names": ["b"], "image_transform_args": VIT},
    )
    before = file.read_text()
    talk, look = load(file)
    assert (talk.name, talk.weight, talk.is_mandatory, talk.options) == ("talk", 2.0, True, {"turns": 4})
    assert (look.weight, look.is_mandatory, look.vit_transform, look.vae_transform) == (1.0, False, VIT, None)
    assert talk.sources[0].location == {"jsonl_path": str(tmp_path / "a.jsonl")}
    talk, look = build_groups([talk, look], tokenizer=None)
    assert records(talk) == ["a0", "a1", "a2", *(f"b{i}" for i in range(10))]
    assert talk.dataset.turns == 4
    assert look.dataset.vit_transform.stride == 8
    assert file.read_text() == before


def test_the_mapping_form(write):
    file = write(
        talk={
            "dataset_names": {"one": ["a"], "two": ["a", "b"]},
            "weight": {"one": 1.0, "two": 3.0},
            "num_used_data": {"one": [2], "two": [0, 4]},
            "turns": 1,
        }
    )
    one, two = load(file)
    assert [(s.name, s.weight) for s in (one, two)] == [("talk_one", 1.0), ("talk_two", 3.0)]
    assert [(s.start, s.end) for s in (*one.sources, *two.sources)] == [(0, 2), (0, None), (0, 4)]


def test_two_groups_of_one_class(write):
    file = write(
        x={"type": "talk", "dataset_names": ["a"], "turns": 1},
        y={"type": "talk", "dataset_names": ["b"], "turns": 2},
    )
    assert [(s.name, s.dataset_class, s.options["turns"]) for s in load(file)] == [
        ("x", TalkDataset, 1),
        ("y", TalkDataset, 2),
    ]


@pytest.mark.parametrize(
    "used, names, expected",
    [
        (None, "ab", [(0, None), (0, None)]),
        (0, "ab", [(0, None), (0, None)]),
        (5, "ab", [(0, 5), (0, 5)]),
        ([3, 0], "ab", [(0, 3), (0, None)]),
        ([7], "a", [(0, 7)]),
        ([2, 7], "a", [(2, 7)]),
        ([0, 0], "a", [(0, None)]),
        ({"a": [2, 7]}, "ab", [(2, 7), (0, None)]),
        ({"a": 4, "b": [0, 0]}, "ab", [(0, 4), (0, None)]),
    ],
)
def test_num_used_data_in_all_its_forms(used, names, expected):
    assert used_ranges(used, list(names), "f: g.num_used_data") == expected


@pytest.mark.parametrize("used", [[1, 2, 3], "all", {"c": [1, 2]}, [5, 2], [-1], {"a": [3, 3]}])
def test_other_forms_are_refused(used):
    with pytest.raises(ValueError, match="f: g.num_used_data"):
        used_ranges(used, ["a"], "f: g.num_used_data")


def test_how_a_pair_was_read_is_logged(caplog):
    caplog.set_level("INFO")
    used_ranges([2, 7], ["a"], "here")
    used_ranges([2, 7], ["a", "b"], "here")
    assert "of one data set is read as a range" in caplog.text
    assert "is read as how many records of each data set" in caplog.text


def test_shuffled_selection(write):
    entry = {
        "dataset_names": ["a"],
        "num_used_data": [4],
        "turns": 1,
        "shuffle_lines": True,
        "shuffle_seed": 3,
    }
    chosen = records(*build_groups(load(write(talk=entry)), None))
    assert len(set(chosen)) == 4
    assert chosen != ["a0", "a1", "a2", "a3"]
    assert chosen == records(*build_groups(load(write(talk=entry)), None))


def talk(**changes):
    return {"dataset_names": ["a"], "turns": 1, **changes}


@pytest.mark.parametrize(
    "content, message",
    [
        ({"tolk": talk()}, r"mix.yaml: tolk: no dataset class 'tolk'; did you mean 'talk'\?"),
        ({"x": talk(type="tlk")}, r"mix.yaml: x: no dataset class 'tlk'; did you mean 'talk'\?"),
        ({"talk": talk(wieght=1)}, r"mix.yaml: talk: unknown key 'wieght'; did you mean 'weight'\?"),
        ({"talk": talk(turns="3")}, r"mix.yaml: talk.turns: expected a whole number, found '3'"),
        ({"talk": talk(turns=1.5)}, r"talk.turns: expected a whole number, found 1.5"),
        ({"talk": talk(turns=True)}, r"talk.turns: expected a whole number, found True"),
        ({"talk": talk(shout="no")}, r"talk.shout: expected true or false, found 'no'"),
        ({"talk": talk(words="hm")}, r"talk.words: expected a list, each entry a text or null, found 'hm'"),
        ({"talk": talk(words=["hm", 1])}, r"talk.words: expected a list, each entry a text or null, found \['hm', 1\]"),
        ({"talk": talk(extra=[1])}, r"talk.extra: expected keys with values or null, found \[1\]"),
        ({"talk": talk(dataset_names={})}, r"talk.dataset_names: expected data set names, or parts with names, found {}"),
        ({"talk": talk(type=["talk"])}, r"mix.yaml: talk: no dataset class \['talk'\]"),
        ({"talk": talk(shoot=1)}, r"mix.yaml: talk: unknown key 'shoot'; did you mean 'shout'\?"),
        ({"talk": {"dataset_names": ["a"]}}, "mix.yaml: talk: the key 'turns' is missing"),
        ({"talk": {"turns": 1}}, "mix.yaml: talk: the key 'dataset_names' is missing"),
        ({"talk": talk(dataset_names=["aa"])}, r"nothing says where 'aa' is; did you mean 'a'\?.*dataset_info.talk.aa"),
        ({"talk": talk(dataset_names="a")}, "talk.dataset_names: expected a list of data set names"),
        ({"talk": talk(dataset_names={"p": []})}, "talk.dataset_names.p: expected a list"),
        ({"talk": talk(dataset_names={"part": ["a"]}, weight={"prt": 1})}, "weight: no such group 'prt'; did you mean 'part'"),
        ({"talk": talk(weight=-1)}, "talk.weight: expected a number from 0, found -1"),
        ({"talk": talk(weight=0)}, "mix.yaml: no group with a weight above 0"),
        ({"talk": talk(is_mandatory="yes")}, "talk.is_mandatory: expected true or false"),
        ({"talk": ["a"]}, "mix.yaml: talk: expected keys such as 'dataset_names'"),
        ({"look": {"dataset_names": ["a"]}}, "look: the key 'image_transform_args' is missing"),
        ({"dataset_info": {"talk": {"a": {"jsonl": "x"}}}}, "talk.a: unknown key 'jsonl'; did you mean 'jsonl_path'"),
        ({"dataset_info": {"tlk": {}}}, "dataset_info: no dataset class 'tlk'; did you mean 'talk'"),
        ({"dataset_info": {"talk": {"a": {"tar_path": "x"}}}, "talk": talk()}, "the key 'jsonl_path' is missing, talk reads it"),
    ],
)  # fmt: skip
def test_mistakes_are_named(write, content, message):
    with pytest.raises(ValueError, match=message):
        load(write(**content))


def test_mistakes_in_transforms_and_files_name_the_group(write, tmp_path):
    entry = {"dataset_names": ["a"], "image_transform_args": {**VIT, "image_strid": 8}}
    with pytest.raises(ValueError, match=r"group 'look': .*'image_strid'"):
        build_groups(load(write(look=entry)), None)
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(ValueError, match=r"group 'talk': .*a.jsonl: no such file; check 'jsonl_path'"):
        build_groups(load(write(talk=talk())), None)
    with pytest.raises(ValueError, match=r"group 'talk': b: records 50 to 60 .* change 'num_used_data'"):
        build_groups(load(write(talk=talk(dataset_names=["b"], num_used_data=[50, 60]))), None)


def test_a_repeated_key_is_refused(tmp_path):
    file = tmp_path / "mix.yaml"
    file.write_text("talk: {turns: 1}\ntalk: {turns: 2}\n")
    with pytest.raises(ValueError, match="mix.yaml: .*line 2: the key 'talk' is there twice"):
        load(file)


@pytest.mark.parametrize("text", ["", "- a", "a: [", "a: 'b"])
def test_what_is_no_mixture_is_refused(tmp_path, text):
    file = tmp_path / "mix.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match="mix.yaml: "):
        load(file)
    with pytest.raises(ValueError, match="gone.yaml: cannot be read .*check --dataset_config_file"):
        load(tmp_path / "gone.yaml")


@pytest.mark.parametrize("text", ["? [a]\n: 1\n", "a: &a\n  b: *a\n"])
def test_yaml_that_python_cannot_hold_is_refused(tmp_path, text):
    (tmp_path / "mix.yaml").write_text(text)
    with pytest.raises(ValueError, match="mix.yaml: (not valid YAML: .*unhashable|nested too deep)"):
        load(tmp_path / "mix.yaml")


def test_a_folder_of_pictures_that_is_not_there_is_told_at_the_start(write, tmp_path):
    places = {"a": {"jsonl_path": "a.jsonl", "data_dir": "gone"}}
    look = {"dataset_names": ["a"], "vit_image_transform_args": VIT}
    groups = {"look": look, "talk": {"dataset_names": ["a"], "turns": 1}}
    file = write(dataset_info={"look": places, "talk": places}, **groups)
    with pytest.raises(
        ValueError, match=f"group 'look': {tmp_path}/gone: no such folder; check 'data_dir' of a in"
    ):
        build_groups(load(file), tokenizer=None)
    (text_only,) = [spec for spec in load(file) if spec.name == "talk"]
    assert len(build_groups([text_only], tokenizer=None)[0].source) == 10  # it reads no picture


def test_environment_variables_are_filled_in(write, tmp_path, monkeypatch):
    info = {"talk": {"a": {"jsonl_path": "${WEFT_TEST_DIR:.}/a.jsonl"}}}
    file = write(dataset_info=info, talk=talk())
    assert load(file)[0].sources[0].location["jsonl_path"] == str(tmp_path / "a.jsonl")
    monkeypatch.setenv("WEFT_TEST_DIR", "/elsewhere")
    assert load(file)[0].sources[0].location["jsonl_path"] == "/elsewhere/a.jsonl"
    unset = write(dataset_info={"talk": {"a": {"jsonl_path": "${WEFT_TEST_UNSET}"}}}, talk=talk())
    with pytest.raises(
        ValueError,
        match="dataset_info.talk.a.jsonl_path: the environment variable WEFT_TEST_UNSET is not set",
    ):
        load(unset)


def test_locations_from_python(write, tmp_path):
    info = {"talk": {"c": {"data_dir": "/data", "jsonl_path": "/data/c.jsonl", "num_total_samples": 1000}}}
    (spec,) = load(write(talk=talk(dataset_names=["c"])), info)
    assert spec.sources[0].location == {"data_dir": "/data", "jsonl_path": "/data/c.jsonl"}


# ------------------------------------------------------------------------------------- the published code's lists


@pytest.mark.parametrize(
    "used, names, expected",
    [
        ([3], "ab", [(0, 3)]),  # a short list drops the names beyond it
        ([3, 4, 5], "ab", [(0, 3), (0, 4)]),
        ([3, 4], "a", [(0, 3)]),
        (3, "ab", [(0, 3), (0, 3)]),
        ({"a": [2, 7]}, "ab", [(2, 7), (0, None)]),
    ],
)
def test_num_used_data_as_published(used, names, expected):
    assert used_ranges(used, list(names), "f: g.num_used_data", as_published=True) == expected


def test_what_a_short_list_leaves_out_is_said(write, caplog):
    short = talk(dataset_names=["a", "b"], num_used_data=[3])
    with pytest.raises(ValueError, match=r"num_used_data: \[3\] fits none of: a number; one per name \(2\)"):
        load(write(talk=short))
    (group,) = load(write(talk={**short, "upstream_compat": True}))
    assert [s.dataset for s in group.sources] == ["a"] and "no number for b; not used" in caplog.text
    assert group.options["upstream_compat"] is True


def test_a_class_is_told_of_upstream_compat_only_if_it_asks(write):
    class Deaf(TaskDataset):
        def __init__(self, *, tokenizer, vit_transform=None, vae_transform=None):
            super().__init__(tokenizer=tokenizer)

        def to_sample(self, record, rng) -> Sample:
            raise NotImplementedError

    file = write(talk={"dataset_names": ["a"], "upstream_compat": True})
    (spec,) = load_mixture(file, {**REGISTRY, "talk": Deaf}, {})
    assert spec.options == {} and build_groups([spec], None)[0].dataset.upstream_compat is False


@pytest.mark.parametrize("key", ["is_mandatory", "shuffle_lines", "upstream_compat", "resume_data_status"])
def test_switches_are_true_or_false(write, key):
    with pytest.raises(ValueError, match=f"talk.{key}: expected true or false, found 'yes'"):
        load(write(talk=talk(**{key: "yes"})))


def test_a_seed_is_a_number(write):
    with pytest.raises(ValueError, match="talk.shuffle_seed: expected a whole number, found 'x'"):
        load(write(talk=talk(shuffle_lines=True, shuffle_seed="x")))


def test_that_the_data_state_is_always_resumed_is_said(write, caplog):
    load(write(talk=talk(resume_data_status=True)))
    assert "resume_data_status" not in caplog.text
    load(write(talk=talk(resume_data_status=False)))
    assert "talk.resume_data_status: false has no effect" in caplog.text


def test_transforms_without_a_use_are_said(write, caplog):
    caplog.set_level("INFO")
    load(write(talk=talk(image_transform_args=VIT)))
    assert "talk.image_transform_args: not used, talk needs no pictures for the VAE" in caplog.text


class RowDataset(TaskDataset):
    """Reads Parquet."""

    source_format = "parquet"

    def to_sample(self, record, rng) -> Sample:
        raise NotImplementedError


@pytest.fixture
def write_parquet(tmp_path):
    """Writes a mixture over three files of 3, 1 and 2 records; gives their numbers in the order of the group."""
    parquet, arrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    for name, rows in (("x0", [0, 1, 2]), ("x1", [3]), ("x2", [4, 5])):
        parquet.write_table(arrow.table({"i": rows}), tmp_path / f"{name}.parquet")

    def records_of(used, **changes):
        entry = {"dataset_names": ["a"], "num_used_data": used, **changes}
        info = {"rows": {"a": {"data_dir": "."}}}
        (tmp_path / "mix.yaml").write_text(yaml.safe_dump({"dataset_info": info, "rows": entry}))
        (group,) = build_groups(load_mixture(tmp_path / "mix.yaml", {"rows": RowDataset}, {}), None)
        return records(group)

    return records_of


@pytest.mark.parametrize(
    "used, expected",
    [
        ([0], [0, 1, 2, 3, 4, 5]),
        ([2], [0, 1, 2, 3]),
        ([3], [0, 1, 2, 3, 4, 5]),
        ([5], [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]),
        ([1, 3], [3, 4, 5]),
    ],
)
def test_num_used_data_counts_files_of_parquet(write_parquet, used, expected):
    assert write_parquet(used) == expected


def test_files_that_are_not_there_and_files_in_random_order_are_refused(write_parquet):
    with pytest.raises(ValueError, match="a: file 3 was asked for, there are 3; change 'num_used_data'"):
        write_parquet([3, 5])
    with pytest.raises(ValueError, match="rows.shuffle_lines: num_used_data counts files here"):
        write_parquet([2], shuffle_lines=True)
    assert sorted(write_parquet([0], shuffle_lines=True)) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    "keys, expected",
    [
        ({}, ("repeat", None)),
        ({"when_exhausted": "repeat"}, ("repeat", None)),
        ({"when_exhausted": "drop"}, ("drop", 1)),
        ({"when_exhausted": "stop", "epochs": 3}, ("stop", 3)),
    ],
)
def test_what_follows_the_last_record(write, tokenizer, keys, expected):
    specs = load(write(talk={"dataset_names": ["a"], "turns": 1, **keys}))
    (group,) = build_groups(specs, tokenizer)
    assert (specs[0].when_exhausted, specs[0].epochs) == (group.when_exhausted, group.epochs) == expected


@pytest.mark.parametrize(
    "keys, message",
    [
        ({"when_exhausted": "end"}, "talk.when_exhausted: expected one of repeat, drop, stop, found 'end'"),
        (
            {"epochs": 2},
            "talk.epochs: a group that repeats has no last epoch; add when_exhausted: drop or stop",
        ),
        ({"when_exhausted": "drop", "epochs": 0}, "talk.epochs: expected a whole number from 1, found 0"),
        (
            {"when_exhausted": "drop", "epochs": True},
            "talk.epochs: expected a whole number from 1, found True",
        ),
    ],
)
def test_ends_that_make_no_sense_are_refused(write, keys, message):
    with pytest.raises(ValueError, match=message):
        load(write(talk={"dataset_names": ["a"], "turns": 1, **keys}))
