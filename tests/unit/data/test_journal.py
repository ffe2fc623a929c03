"""Ledger and journal of a run, read back: accounts that add up or are said not to, packs made again with the same tensors."""

import itertools
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from data import ledger, replay
from data.journal import journal_name, plan_from_json, plan_to_json, read_step, step_line
from data.layout import LayoutSpec
from data.ledger import (
    Demand,
    accounts,
    add_amounts,
    count_trained,
    format_accounts,
    format_shares,
    scalars,
    shares,
)
from data.loader import build_loader
from data.mixture import build_groups, load_mixture
from data.packing import content_hash
from data.policy import PackBudget
from data.stream import StreamPlan
from data.types import Amount, LaneCursor, amounts_to_json
from tests.unit.data.toy_groups import group, lengths, plan
from train.distributed.session import World
from train.journal import Journal

LANES, WORLD, STEPS = 4, 2, 6
TALK = "SftJSONLIterableDataset_TextOnly"


@pytest.fixture(scope="module")
def run(tmp_path_factory, tokenizer) -> Path:
    """What two ranks leave behind after six steps of two packs, the last checkpoint being of the sixth."""
    root = tmp_path_factory.mktemp("journal")
    for name, count in (("often", 60), ("seldom", 20)):
        rows = [
            {
                "message": [
                    {"from": "human", "value": f"{name} {i}?"},
                    {"from": "gpt", "value": "yes " * (i % 9 + 1)},
                ]
            }
            for i in range(count)
        ]
        rows[3] = {"message": "broken"} if name == "often" else rows[3]
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    entries = {
        name: {"type": TALK, "dataset_names": [name], "weight": weight}
        for name, weight in (("often", 3.0), ("seldom", 1.0))
    }
    info = {TALK: {name: {"jsonl_path": f"{name}.jsonl"} for name in entries}}
    (root / "mix.yaml").write_text(yaml.safe_dump({**entries, "dataset_info": info}))
    specs = load_mixture(root / "mix.yaml")
    run_plan = StreamPlan(
        groups=build_groups(specs, tokenizer),
        layout=LayoutSpec(),
        special=tokenizer.special,
        budget=PackBudget(expected=180, maximum=200, per_sample=200, max_buffer=6),
        seed=3,
        num_lanes=LANES,
        max_reject_fraction=0.5,
    )
    world = World(rank=0, local_rank=0, size=WORLD, device=torch.device("cpu"))
    journal = Journal(root, world, steps_done=0, plan=run_plan, specs=specs, tokenizer=tokenizer)
    ranks = [build_loader(run_plan, rank=r, world_size=WORLD) for r in range(WORLD)]
    cursors = [LaneCursor(lane=lane) for lane in range(LANES)]
    trained: dict[str, Amount] = {}
    hashes = {}
    for step in range(1, STEPS + 1):
        batches = [next(rank) for rank in ranks]
        hashes[step] = [content_hash(b) for b in batches]
        journal.step(step, [batches[0]])
        with (root / journal_name(1)).open(
            "a"
        ) as file:  # one process is one rank: the other's lines, as it writes them
            file.write(step_line(step, [batches[1]]) + "\n")
        for batch in batches:
            cursors[batch.cursor.lane] = batch.cursor
            add_amounts(trained, count_trained(batch))
    journal.close()
    checkpoint = root / "checkpoints" / f"{STEPS:07d}"
    checkpoint.mkdir(parents=True)
    demands = {g.name: Demand(weight=g.weight, records=len(g.source)) for g in run_plan.groups}
    state = {
        "step": STEPS,
        "trained": amounts_to_json(trained),
        "demands": {name: d.to_json() for name, d in demands.items()},
        "lanes": [cursor.to_json() for cursor in cursors],
    }
    (checkpoint / "data.json").write_text(json.dumps(state))
    (root / "hashes.json").write_text(json.dumps(hashes))
    return root


def test_every_pack_of_every_step_is_made_again(run, capsys):
    hashes = json.loads((run / "hashes.json").read_text())
    for step in range(1, STEPS + 1):
        assert replay.main([str(run), "--step", str(step), "--json"]) == 0
        packs = json.loads(capsys.readouterr().out)["packs"]
        assert [p["rank"] for p in packs] == [0, 1]
        assert [p["hash"] for p in packs] == [p["hash_of_training"] for p in packs] == hashes[str(step)]
        assert all(sum(s["tokens"] for s in p["samples"]) == p["tokens"] for p in packs)
    assert replay.main([str(run), "--step", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("rank 0 lane 2: ") and lines[0].endswith(f"hash {hashes['2'][0]} (the same)")
    assert any("often.jsonl" in line for line in lines)


def test_a_record_that_changed_is_noticed(run, tmp_path, capsys):
    entry = read_step(run, 4)[1][0]
    where = replay.replay(run, 4)[0][1].origins[0].where
    file, _, line = where.rpartition(":")
    before = Path(file).read_text()
    rows = before.splitlines(keepends=True)
    rows[int(line) - 1] = rows[int(line) - 1].replace("yes", "yea")
    try:
        Path(file).write_text("".join(rows))
        assert replay.main([str(run), "--step", "4"]) == 1
        captured = capsys.readouterr()
        assert f"DIFFERENT from {entry.hash}" in captured.out and "its data have changed" in captured.err
    finally:
        Path(file).write_text(before)


def test_what_is_not_there_is_said(run, tmp_path, capsys):
    assert replay.main([str(run), "--step", "99"]) == 2
    assert "its journal has no step 99; it goes up to 6" in capsys.readouterr().err
    assert replay.main([str(tmp_path), "--step", "1"]) == 2
    assert "no journal.*.jsonl here; name a run's --results_dir" in capsys.readouterr().err
    assert ledger.main([str(tmp_path)]) == 2
    assert ledger.main([str(run), "--step", "5"]) == 2
    assert "no checkpoint of step 5; there are 6" in capsys.readouterr().err


def test_a_run_that_goes_on_writes_over_what_was_not_saved(run, tmp_path, tokenizer):
    for rank in range(WORLD):
        text = (run / journal_name(rank)).read_text()
        (tmp_path / journal_name(rank)).write_text(
            text + '{"step": 7, "packs": [{"la'
        )  # killed while writing
    stored, _ = read_step(run, 1)
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    again = plan_from_json(stored)
    specs = load_mixture(run / "mix.yaml")
    journal = Journal(
        tmp_path, world, steps_done=3, plan=replace(again, seed=4), specs=specs, tokenizer=tokenizer
    )
    batch = next(build_loader(replace(again, seed=4)))
    journal.step(4, [batch])
    journal.close()
    assert [len(read_step(tmp_path, step)[1]) for step in (1, 2, 3, 4)] == [2, 2, 2, 1]
    with pytest.raises(ValueError, match="no step 5; it goes up to 4"):
        read_step(tmp_path, 5)
    ((entry, made),) = replay.replay(tmp_path, 4)  # with the plan that held then
    assert content_hash(made) == entry.hash == batch.hash
    assert read_step(tmp_path, 3)[0]["seed"] == 3


def test_rejected_records_of_dropped_steps_come_again(run, tmp_path, tokenizer):
    """By whichever rank: a record must not stand in these files twice."""
    for rank in (0, 1):
        rows = "".join(json.dumps({"step": step, "where": f"rows.jsonl:{step}"}) + "\n" for step in (2, 4, 5))
        (tmp_path / f"rejects.{rank}.jsonl").write_text(rows + '{"step": 3, "whe')
    specs = load_mixture(run / "mix.yaml")
    toy = replace(plan(), groups=build_groups(specs, tokenizer))
    world = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    Journal(tmp_path, world, steps_done=4, plan=toy, specs=specs, tokenizer=tokenizer).close()
    for rank in (0, 1):
        lines = (tmp_path / f"rejects.{rank}.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [2, 4]


@pytest.mark.parametrize("tool", [ledger, replay])
def test_nobody_has_to_read_to_the_end(tool, run, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with monkeypatch.context() as patch, os.fdopen(writer, "w") as pipe:
        patch.setattr(sys, "stdout", pipe)
        assert tool.main([str(run), "--step", str(STEPS)]) == 0
    assert capsys.readouterr().err == ""


def test_a_replay_finds_the_indexes_where_the_run_had_them(run, tmp_path, capsys):
    command = [str(run), "--step", "2", "--index_cache_dir", str(tmp_path / "indexes")]
    assert replay.main(command) == 0
    assert {p.name.split(".")[0] for p in (tmp_path / "indexes").iterdir()} == {"often", "seldom"}


def test_a_plan_is_the_same_after_json(run, tokenizer):
    stored, _ = read_step(run, 1)
    again = plan_from_json(json.loads(json.dumps(stored)))
    assert json.loads(json.dumps(plan_to_json(again, load_mixture(run / "mix.yaml"), tokenizer))) == stored
    with pytest.raises(ValueError, match="of another version"):
        plan_from_json({**stored, "layout": {"no_such": 1}})


def test_the_hash_is_of_every_tensor_and_of_the_layout():
    stream = build_loader(plan(group("image", lengths(40, 5, 30), image=True), num_lanes=1))
    batch = next(stream)
    assert batch.hash == content_hash(batch) != next(stream).hash
    changes = {"text_ids": batch.text_ids + 1, "gen_key": batch.gen_key + 1, "split_lens": (1, *batch.split_lens[1:]),
               "und_patches": torch.zeros(1, 192, dtype=torch.uint8), "label_weight": batch.label_weight * 2,
               "label_role": batch.label_role + 1}  # fmt: skip
    for name, value in changes.items():
        assert content_hash(replace(batch, **{name: value})) != batch.hash, name
    assert content_hash(replace(batch, origins=(), cursor=LaneCursor(lane=3))) == batch.hash


def test_the_ledger_of_a_run_adds_up(run, capsys):
    assert ledger.main([str(run)]) == 0
    out = capsys.readouterr().out
    assert "step 6" in out and "rejected: 1 " in out and "75.00%" in out
    assert ledger.main([str(run / "checkpoints" / "0000006"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["law_holds"] and found["shares"]["often"]["requested"] == 0.75
    for name, a in found["groups"].items():
        parts = [a["trained"], a["waiting"], a["lost"], *a["rejected"].values()]
        assert a["read"] == [sum(column) for column in zip(*parts, strict=True)], name
    assert 0.6 < found["shares"]["often"]["samples"] < 0.9


@pytest.mark.parametrize(
    "column, words", [(0, "read {} != trained"), (1, "(in tokens)"), (2, "(in loss tokens)")]
)
def test_a_broken_law_is_said_and_ends_with_an_error(run, tmp_path, capsys, column, words):
    state = json.loads((run / "checkpoints" / "0000006" / "data.json").read_text())
    state["trained"]["often"][column] += 1
    (tmp_path / "0000006").mkdir()
    (tmp_path / "0000006" / "data.json").write_text(json.dumps(state))
    assert ledger.main([str(tmp_path)]) == 1
    captured = capsys.readouterr()
    read = sum(lane["read"].get("often", [0])[0] for lane in state["lanes"])
    assert "BROKEN: " in captured.out and words.format(read) in captured.out
    assert "the law is broken" in captured.err


def test_what_was_trained_on_is_counted_from_the_tensors():
    """Against the sizes that the packer went by, which `accounts` compares: pictures, texts, left-out conditions."""
    groups = (group("image", lengths(50, 5, 40), image=True), group("text", lengths(50, 5, 40), weight=2.0))
    trained: dict[str, Amount] = {}
    stream = build_loader(plan(*groups, num_lanes=1))
    for batch in itertools.islice(stream, 20):
        add_amounts(trained, count_trained(batch))
    found = accounts([batch.cursor], trained)
    assert found["image"].trained.loss_tokens and found["text"].trained.tokens
    assert "image" in format_accounts(found)
    demands = {g.name: Demand(weight=g.weight, records=50) for g in groups}
    share = shares(found, demands)
    assert (
        share["text"]["requested"] == pytest.approx(2 / 3) and sum(s["tokens"] for s in share.values()) == 1
    )
    assert format_shares(found, demands).startswith(
        "share of draws requested, of samples and of tokens trained on: image 33.3% "
    )
    values = scalars(found, demands)
    assert values["ledger/text/trained_tokens"] == found["text"].trained.tokens
    assert values["ledger/image/share_delivered"] == share["image"]["samples"]


def test_three_rows_on_four_ranks_end_cleanly_or_repeat_and_say_so(caplog):
    """Decided: without `when_exhausted` a small group repeats, which is said at the start and shown by the ledger."""

    def four_ranks(rows):
        return [build_loader(plan(rows, num_lanes=48), rank=r, world_size=4) for r in range(4)]

    for policy in ("stop", "drop"):
        ranks = four_ranks(group("rows", [20, 30, 40], when_exhausted=policy, epochs=1))
        steps = [[next(rank) for rank in ranks] for _ in range(3)]
        first = [b for b in steps[0] if not b.is_filler]
        assert sorted(o.where for b in first for o in b.origins) == [f"toy.jsonl:{i}" for i in (1, 2, 3)]
        assert len(steps[0]) == 4 and all(
            b.is_filler and not b.num_tokens for step in steps[1:] for b in step
        )
        assert not caplog.text
    steps = [[next(rank) for rank in four_ranks(group("rows", [20, 30, 40]))]]
    assert all(b.num_tokens for b in steps[0])
    assert (
        "group 'rows': 3 records for 48 lanes: when every lane has read one, each record was read 16 times"
        in caplog.text
    )
