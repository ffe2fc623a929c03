"""A checkpoint restores the run on any number of ranks, and nothing half-written, damaged or foreign is ever taken for one."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data.types import Amount, LaneCursor
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import LANES, build, rows, toy_args
from train.args import CheckpointArgs
from train.checkpoint import Checkpoints, Start
from train.distributed.collectives import rank, world_size
from train.distributed.sharding import clip_grad_norm
from train.optim import set_learning_rates
from train.state import TrainState

NUM_ROWS = 12


def advance(state: TrainState, steps: int, **flags: object) -> list[float]:
    """Train on; every rank has its share of the rows and of the lanes."""
    args = toy_args(**flags)
    x, y = (part.chunk(world_size())[rank()] for part in rows(NUM_ROWS))
    norms = []
    for _ in range(steps):
        set_learning_rates(state.optimizer, state.step, args.optim)
        ((state.model(x).boxes - y).square().sum() / NUM_ROWS).backward()
        norms.append(float(clip_grad_norm(state.model.parameters(), 1.0)))
        state.optimizer.step()
        state.ema.update(state.step)
        state.optimizer.zero_grad()
        for lane in range(rank(), LANES, world_size()):
            packs = state.cursors[lane].packs + 1
            state.consume(
                LaneCursor(lane=lane, packs=packs, read={"vqa": Amount(2 * packs)}), {"vqa": Amount(2)}
            )
        state.packs_consumed += LANES
        state.step += 1
    return norms


def summary(state: TrainState, norms: list[float]) -> dict[str, Any]:
    return {"tensors": full_tensors(state.tensors().items()), "progress": state.progress(), "norms": norms}


def run(folder: str, before: int, after: int) -> dict[str, Any]:
    """Continue from the newest checkpoint if there is one, save after `before` steps, go on for `after`."""
    args = toy_args(checkpoint_dir=folder, auto_resume=True)
    state = build(args)
    checkpoints = Checkpoints(args.checkpoint.directory, args.checkpoint.max_checkpoints, args.flat())
    start = checkpoints.open(args.checkpoint)
    if start is not None:
        checkpoints.restore(state, start)
    norms = advance(state, before)
    if before:
        checkpoints.save(state)
    return summary(state, norms + advance(state, after))


def assert_same(a: dict[str, Any], b: dict[str, Any], *, exact: bool) -> None:
    assert a["progress"] == b["progress"]
    assert a["tensors"].keys() == b["tensors"].keys()
    tolerance = {"rtol": 0.0, "atol": 0.0} if exact else {"rtol": 1e-4, "atol": 1e-6}
    for name, value in a["tensors"].items():
        torch.testing.assert_close(value, b["tensors"][name], **tolerance, msg=name)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_resume_on_other_world_sizes(tmp_path: Path, before: int, after: int) -> None:
    whole = run_distributed(run, before, str(tmp_path), 3, 3)[0]
    resumed = run_distributed(run, after, str(tmp_path), 0, 3)[0]
    same_size = before == after
    assert resumed["norms"] == (
        whole["norms"][3:] if same_size else pytest.approx(whole["norms"][3:], rel=1e-4)
    )
    assert_same(resumed, whole, exact=same_size)
    assert whole["progress"]["packs_consumed"] == 6 * LANES
    assert whole["progress"]["trained"] == {"vqa": [6 * LANES * 2, 0, 0]}
    assert [lane["packs"] for lane in resumed["progress"]["lanes"]] == [6] * LANES


def test_what_a_step_holds_and_how_many_are_kept(tmp_path: Path) -> None:
    state = build(toy_args(), sharded=False)
    checkpoints = Checkpoints(tmp_path, 2, {"lr": 0.01})
    for _ in range(3):
        advance(state, 1)
        checkpoints.save(state)
    assert sorted(os.listdir(tmp_path)) == ["0000002", "0000003"]
    step = tmp_path / "0000003"
    assert checkpoints.latest() == step
    assert json.loads((step / "args.json").read_text()) == {"lr": 0.01}
    manifest = json.loads((step / "manifest.json").read_text())
    assert manifest["step"] == 3
    assert set(manifest["files"]) == {"args.json", "data.json", "state/.metadata", "state/__0_0.distcp"}


def saved(tmp_path: Path, steps: int = 2) -> Checkpoints:
    state = build(toy_args(), sharded=False)
    checkpoints = Checkpoints(tmp_path, 0)
    for _ in range(steps):
        advance(state, 1)
        checkpoints.save(state)
    return checkpoints


def test_a_run_may_go_on_with_a_fresh_optimizer(tmp_path: Path) -> None:
    saved(tmp_path)
    old, state = build(toy_args(), sharded=False), build(toy_args(), sharded=False)
    Checkpoints(tmp_path, 0).restore(old, Start(path=tmp_path / "0000002"))
    Checkpoints(tmp_path, 0).restore(state, Start(path=tmp_path / "0000002", moments=False))
    assert state.step == old.step == 2 and state.progress() == old.progress()
    assert old.optimizer.state and not state.optimizer.state
    for name, value in old.tensors(moments=False).items():
        assert torch.equal(state.tensors(moments=False)[name], value), name


def test_half_written_and_foreign_directories_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    newest = tmp_path / "0000002"
    for name in ("0000009.tmp", "0000008", "notes", "0000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "0000007" / "manifest.json").write_text('{"files": {}}')
    assert checkpoints.latest() == newest
    data = newest / "state" / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1])  # a truncated file
    assert checkpoints.latest() == tmp_path / "0000001"
    (newest / "manifest.json").write_text("{")
    assert checkpoints.latest() == tmp_path / "0000001"


def test_a_save_that_is_killed_at_any_file_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = saved(tmp_path, 1)
    state = build(toy_args(), sharded=False)
    state.step = 2

    class Killed(BaseException):
        pass

    def killed(*args: object) -> None:
        raise Killed

    real_rename = os.rename

    def killed_at_the_end(source: object, target: object) -> None:
        if Path(str(source)).name == "0000002.tmp":  # torch renames files of its own, which must still work
            raise Killed
        real_rename(source, target)  # type: ignore[arg-type]

    stops = {
        "save_tensors": killed,
        "write_json": killed,
        "_describe_files": killed,
        "os.rename": killed_at_the_end,
    }
    for target, stop in stops.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"train.checkpoint.{target}", stop)
            with pytest.raises(Killed):
                checkpoints.save(state)
        assert (tmp_path / "0000002.tmp").is_dir()
        assert checkpoints.latest() == tmp_path / "0000001"
    assert checkpoints.open(CheckpointArgs(auto_resume=True)) == Start(path=tmp_path / "0000001")
    assert os.listdir(tmp_path) == ["0000001"]  # opening cleared the draft away
    checkpoints.save(state)
    assert checkpoints.latest() == tmp_path / "0000002"


def test_a_damaged_later_step_neither_blocks_nor_outlives_good_ones(tmp_path: Path) -> None:
    saved(tmp_path)
    manifest = tmp_path / "0000002" / "manifest.json"
    manifest.unlink()
    checkpoints = Checkpoints(tmp_path, 1)
    start = checkpoints.open(CheckpointArgs(auto_resume=True))
    assert start == Start(path=tmp_path / "0000001")
    (tmp_path / "0000009").mkdir()
    state = build(toy_args(), sharded=False)
    checkpoints.restore(state, start)
    advance(state, 1)
    checkpoints.save(state)
    assert checkpoints.latest() == tmp_path / "0000002"
    assert manifest.is_file()
    assert sorted(os.listdir(tmp_path)) == ["0000002", "0000009"]


def test_a_changed_byte_is_noticed_before_anything_is_read(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    file = tmp_path / "0000001" / "state" / ".metadata"
    content = bytearray(file.read_bytes())
    content[10] ^= 1
    file.write_bytes(content)
    state = build(toy_args(), sharded=False)
    with pytest.raises(ValueError, match=r"state/\.metadata changed since it was written; delete 0000001"):
        checkpoints.restore(state, Start(path=tmp_path / "0000001"))


def test_weights_only_and_from_the_average(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    step = tmp_path / "0000002"
    original = build(toy_args(), sharded=False)
    checkpoints.restore(original, Start(path=step))
    assert original.step == 2
    for from_ema in (False, True):
        state = build(toy_args(), sharded=False)
        checkpoints.restore(state, Start(path=step, weights_only=True, from_ema=from_ema))
        expected = {**original.weights(), **(_as_weights(original.ema.averages) if from_ema else {})}
        for name, value in state.weights().items():
            assert torch.equal(value, expected[name]), name
        assert all(torch.equal(x, expected["model." + n]) for n, x in state.ema.averages.items())
        assert (state.step, state.packs_consumed, state.cursors[0].packs) == (0, 0, 0)
        assert state.moments()["optim.step.connector.weight"] == 0


def _as_weights(averages: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"model.{n}": x for n, x in averages.items()}


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    state = build(toy_args(), sharded=False)
    state.ema.averages["heads.extra.weight"] = torch.zeros(2)
    with pytest.raises(ValueError, match=r"has no ema\.heads\.extra\.weight"):
        checkpoints.restore(state, Start(path=tmp_path / "0000001"))
    state = build(toy_args(), sharded=False)
    state.ema.averages["connector.bias"] = torch.zeros(7)
    with pytest.raises(ValueError, match=r"ema\.connector\.bias has shape \[6\], the model needs \[7\]"):
        checkpoints.restore(state, Start(path=tmp_path / "0000001"))


def test_where_a_run_starts(tmp_path: Path) -> None:
    runs, published, empty = tmp_path / "runs", tmp_path / "published", tmp_path / "empty"
    saved(runs)
    published.mkdir()
    (published / "ema.safetensors").write_bytes(b"")
    fresh = Checkpoints(empty, 0)

    def start(**flags: object) -> Start | None:
        return fresh.open(CheckpointArgs(**flags))  # type: ignore[arg-type]

    assert start() is None
    assert start(auto_resume=True) is None
    assert start(resume_from=str(runs)) == Start(path=runs / "0000002")
    assert start(resume_from=str(runs / "0000001"), resume_model_only=True, finetune_from_ema=True) == Start(
        path=runs / "0000001", weights_only=True, from_ema=True
    )
    assert start(resume_from=str(published), resume_model_only=True) == Start(
        path=published, weights_only=True, published=True
    )
    # As published launch lines have it: there is nothing else to take than the weights.
    assert start(resume_from=str(published), finetune_from_ema=True) == Start(
        path=published, weights_only=True, from_ema=True, published=True
    )
    assert start(resume_from=str(runs), resume_model_optimizer=False) == Start(
        path=runs / "0000002", moments=False
    )
    # A newer step of the run itself wins over the place it once started from.
    assert Checkpoints(runs, 0).open(CheckpointArgs(auto_resume=True, resume_from=str(published))) == Start(
        path=runs / "0000002"
    )
    for flags, message in (
        ({"resume_from": str(runs), "finetune_from_ema": True}, "needs --resume_model_only"),
        ({"resume_from": str(tmp_path / "nowhere")}, "there is no such directory"),
        ({"resume_from": str(empty)}, "holds no complete checkpoint"),
    ):
        with pytest.raises(ValueError, match=message):
            start(**flags)


def test_a_run_does_not_mix_with_another(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path)
    with pytest.raises(ValueError, match="up to step 2; continue it with --auto_resume"):
        checkpoints.open(CheckpointArgs())
    with pytest.raises(ValueError, match="resume from the newest"):
        checkpoints.open(CheckpointArgs(resume_from=str(tmp_path / "0000001")))


def open_unwritable(folder: str) -> str:
    try:
        Checkpoints(Path(folder), 0).open(CheckpointArgs())
    except ValueError as error:
        return str(error)
    return ""


def test_a_directory_that_cannot_be_written_stops_every_rank(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    messages = run_distributed(open_unwritable, 2, str(tmp_path / "file" / "checkpoints"))
    assert messages[0] == messages[1]
    assert "cannot write here" in messages[0]
