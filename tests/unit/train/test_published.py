"""The published trainers' flags: all are here, with type, default and meaning; launch lines of the published scripts parse."""

import shlex
from pathlib import Path
from typing import get_args

import pytest

from data.policy import POLICIES
from modeling.ops.attention_backends import ATTENTION, usable_backend
from tests.unit.train.test_config import DATA
from train.args import FsdpArgs
from train.args.data import Packer
from train.args.fsdp import Attention
from train.config import FLAGS, parse_args
from train.published import IMPLIED, PUBLISHED, TRAINERS, ZERO_STAGES, start_up_lines

GOLDEN = Path(__file__).parents[2] / "golden"
LINES = GOLDEN / "launch_lines.txt"
DOCS = Path(__file__).parents[3] / "docs" / "launch_lines.md"


def published_lines() -> str:
    """Flag, type, what it is here, our default, the published defaults."""
    lines = []
    for name, row in PUBLISHED.items():
        published = " ".join(f"{trainer}={default}" for trainer, default in row.defaults.items())
        ours = FLAGS[name].field.default
        lines.append(f"{name:<28}{row.kind:<7}{row.here:<13}{ours!s:<22}{published}".rstrip())
    return "\n".join(lines) + "\n"


def test_the_published_list_is_the_one_written_down() -> None:
    assert published_lines() == (GOLDEN / "published_flags.txt").read_text(), (
        "on purpose? then write published_lines() to published_flags.txt"
    )


def test_the_list_is_whole() -> None:
    by_trainer = {t: sum(t in row.defaults for row in PUBLISHED.values()) for t in TRAINERS}
    # 18 model, 8 data and 45 training flags of Bagel; UniMedVL dropped 6 of them and added 7.
    assert by_trainer == {
        "bagel": 71, "unimedvl": 72, "pixel": 11, "deepspeed": 3, "memory": 6, "validation": 4, "documents": 1,
    }  # fmt: skip
    assert len(PUBLISHED) == 103


@pytest.mark.parametrize("name", PUBLISHED)
def test_types_agree_and_another_default_says_why(name: str) -> None:
    row, ours = PUBLISHED[name], FLAGS[name]
    kinds = {bool: "bool", int: "int", float: "float"}
    assert kinds.get(ours.plain, "text") == row.kind
    published = next(iter(row.defaults.values()))
    assert (ours.field.default == published) == (not row.why), row.why
    if row.answer is not None:
        assert row.answer.plain == ours.field.default, "the default asks for nothing else"


@pytest.mark.parametrize("name", [n for n, row in PUBLISHED.items() if row.here == "not built"])
def test_what_is_not_built_is_refused_by_name(name: str) -> None:
    row = PUBLISHED[name]
    value = {"bool": str(not row.answer.plain), "float": "0.5"}[row.kind]
    with pytest.raises(ValueError, match=f"--{name} {value}: .* is not built yet"):
        parse_args([*DATA, f"--{name}", value])


VALUES = {
    "backward_prefetch": "BACKWARD_POST",
    "vae_lr": "1e-4",
    "e2e_lr": "1e-4",
    "ds_config_file": "ds.json",
    "local_rank": "3",
    "wandb_project": "mine",
    "wandb_name": "mine",
    "wandb_runid": "7",
    "wandb_resume": "must",
    "wandb_offline": "True",
    "prefer_buffer_before": "1",
    "use_flex": "True",
    "cpu_offload": "True",
    "num_replicate": "2",
    "num_shard": "4",
}
"""Another value than the default, of every flag that is answered with a line."""


@pytest.mark.parametrize("name", [n for n, r in PUBLISHED.items() if r.answer and not r.answer.refuse])
def test_what_cannot_apply_says_so(name: str) -> None:
    answer = PUBLISHED[name].answer
    assert answer is not None
    args = parse_args([*DATA, f"--{name}", VALUES[name]])
    values = args.flat()
    if answer.unless is not None and values.get(answer.unless[0]) == answer.unless[1]:
        values[answer.unless[0]] = "another"
    (line,) = start_up_lines(values, "cpu")
    assert line.startswith(f"--{name} ") and line.endswith(answer.text)
    if answer.unless is not None:
        values = {**args.flat(), answer.unless[0]: answer.unless[1]}
        device = values.pop("device", "cpu")
        assert start_up_lines(values, device) == []


def test_a_run_without_flags_has_nothing_to_say() -> None:
    assert start_up_lines(parse_args(DATA).flat(), "cpu") == []


def test_flags_that_stand_for_others_say_for_which() -> None:
    lines = start_up_lines(parse_args([*DATA, "--zero_stage", "1", "--resume_from_ema", "m"]).flat(), "cpu")
    assert lines == [
        "--zero_stage 1: taken as --sharding_strategy SHARD_GRAD_OP",
        "--resume_from_ema m: taken as --resume_from m --resume_model_only True --finetune_from_ema True",
    ]
    assert set(IMPLIED) <= set(FLAGS) and set(ZERO_STAGES) == set(range(4))


def test_choices_are_the_rows_of_their_tables() -> None:
    assert get_args(Packer) == tuple(POLICIES)
    assert get_args(Attention) == tuple(ATTENTION)


def test_use_flex_counts_on_a_gpu() -> None:
    args = FsdpArgs(use_flex=True)
    assert (args.backend("cuda"), args.backend("cpu")) == ("flex", "auto")
    assert usable_backend("flex", "cuda") == "flex"
    with pytest.raises(ValueError, match="--attention flex needs a GPU"):
        usable_backend(FsdpArgs(attention="flex").backend("cpu"), "cpu")


def launch_lines() -> dict[str, str]:
    """Name -> command line, of the lines that the published scripts are written with."""
    lines, name = {}, ""
    for line in LINES.read_text().splitlines():
        if line.startswith("# "):
            name = line[2:]
            lines[name] = ""
        else:
            lines[name] += line.rstrip("\\") + " "
    return lines


@pytest.mark.parametrize("name", launch_lines())
def test_published_launch_lines_parse(name: str) -> None:
    words = shlex.split(launch_lines()[name])
    flags = words[next(i for i, w in enumerate(words) if w.endswith(".py")) + 1 :]
    flat = parse_args(flags).flat()
    assert flat["dataset_config_file"].endswith(".yaml")
    names = (w.partition("=")[0][2:].replace("-", "_") for w in flags if w.startswith("--"))
    given = [name.removeprefix("no_") for name in names]
    assert all(any(flag.startswith(g) for flag in PUBLISHED) for g in given)


def test_the_page_for_people_has_every_exception() -> None:
    text = DOCS.read_text()
    for name, row in PUBLISHED.items():
        if row.why:
            assert f"| `{name}` | {_shown(row)} | {FLAGS[name].field.default or '–'} | {row.why} |" in text, (
                name
            )
        if row.answer is not None:
            assert f"| `{name}` | {row.answer.text} |" in text, name


def _shown(row) -> str:
    return ", ".join(dict.fromkeys(str(d) for d in row.defaults.values()))
