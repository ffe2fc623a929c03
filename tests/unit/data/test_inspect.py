import argparse
import json
import os
import sys
from dataclasses import asdict, fields

import numpy as np
import pytest

from data.inspect import add_plan_flags, attention_picture, main
from data.stream import LaneStream, StreamPlan
from data.types import LaneCursor
from tests.unit.data.toy_groups import plan
from train.args.data import DataArgs


def allowed(batch):
    """Who may attend to whom, from the rule in words; `s s`, query by key."""
    sample = np.repeat(np.arange(len(batch.sample_lens)), batch.sample_lens)
    split = np.repeat(np.arange(len(batch.split_lens)), batch.split_lens)
    mode = np.repeat(batch.split_modes, batch.split_lens)
    q, k = np.ogrid[: len(sample), : len(sample)]
    before = (k <= q) & ((mode != "noise")[None] | (split[q] == split[k]))
    own = (split[q] == split[k]) & (mode != "causal")[None]
    return (sample[q] == sample[k]) & (before | own)


def test_the_picture_shows_the_attention_rule():
    stream = LaneStream(plan(num_lanes=1), LaneCursor(lane=0))
    for _ in range(6):
        batch = stream.next_pack()
        whole = 1024 // batch.num_tokens
        picture = np.asarray(attention_picture(batch))[whole // 2 :: whole, whole // 2 :: whole]
        white_or_grid = (picture == picture[..., :1]).all(-1)
        assert np.array_equal(~white_or_grid, allowed(batch))


@pytest.fixture
def mixture(tmp_path, tokenizer):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(tokenizer.path.read_text())
    (tmp_path / "model" / "vit_config.json").write_text(json.dumps({"patch_size": 8}))
    bagel = {
        "vit_max_num_patch_per_side": 8,
        "latent_patch_size": 2,
        "max_latent_size": 8,
        "interpolate_pos": False,
    }
    (tmp_path / "model" / "bagel_config.json").write_text(json.dumps(bagel))
    row = {"message": [{"from": "human", "value": "Who?"}, {"from": "gpt", "value": "You."}]}
    (tmp_path / "a.jsonl").write_text((json.dumps(row) + "\n") * 3)
    file = tmp_path / "mix.yaml"
    file.write_text(
        "dataset_info: {text_only: {a: {jsonl_path: a.jsonl}}}\ntext_only: {dataset_names: [a]}\n"
    )
    return file


def test_the_command_prints_a_table_and_writes_the_picture(mixture, capsys):
    model, out = str(mixture.parent / "model"), mixture.parent / "pack.png"
    command = ["--dataset_config_file", str(mixture), "--model_path", model, "--out", str(out)]
    assert main([*command, "--expected_num_tokens", "30", "--max_num_tokens", "40"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pack 0 of lane 0: 36 of 40 tokens (90% full), 3 samples of 1 tasks"
    assert sum("'You.'" in line and "supervised" in line for line in lines) == 3
    assert lines[-2].startswith("total: ") and "36 text and marker tokens (15 predicted)" in lines[-2]
    assert out.stat().st_size > 0


def test_the_command_fails_with_one_line(mixture, capsys):
    assert main(["--dataset_config_file", str(mixture), "--model_path", "nowhere"]) == 1
    assert capsys.readouterr().err.startswith("error: nowhere")


@pytest.mark.parametrize("tokens", [40, 4000], ids=["all is still buffered", "some was written"])
def test_the_command_ends_quietly_when_nobody_reads_on(mixture, monkeypatch, capsys, tokens):
    reader, writer = os.pipe()
    os.close(reader)
    command = ["--dataset_config_file", str(mixture), "--model_path", str(mixture.parent / "model")]
    budget = ["--expected_num_tokens", str(tokens - 10), "--max_num_tokens", str(tokens)]
    monkeypatch.chdir(mixture.parent)  # where the picture goes
    # Closing the pipe writes what is still buffered, as the end of a process does.
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert main([*command, *budget]) == 1
    assert capsys.readouterr().err == ""


def test_the_tools_plan_as_the_trainer_does():
    """Every flag that decides which packs come, each with a value of its own, under one name in both."""
    parser = argparse.ArgumentParser()
    add_plan_flags(parser)
    names = {f.name for f in fields(DataArgs)} & vars(parser.parse_args(["--dataset_config_file", ""])).keys()
    numbers = {name: 0.25 + 0.01 * i if "prob" in name or "fraction" in name or "shift" in name else 5000 - i
               for i, name in enumerate(sorted(names - {"dataset_config_file", "index_cache_dir", "packer"}))}  # fmt: skip
    numbers["max_num_tokens"] = 6000
    given = {**numbers, "dataset_config_file": "x.yaml", "packer": "conserving"}
    args = parser.parse_args([f"--{name}={value}" for name, value in given.items()])
    toy = plan()
    ours, theirs = (
        StreamPlan.from_flags(flags, toy.groups, toy.layout, toy.special)
        for flags in (args, DataArgs(**given))
    )
    assert ours == theirs
    told = {*asdict(ours.budget).values(), *asdict(ours.dropout).values(), ours.seed, ours.num_lanes,
            ours.timestep_shift, ours.max_reject_fraction}  # fmt: skip
    assert told == {*numbers.values(), "conserving"}
