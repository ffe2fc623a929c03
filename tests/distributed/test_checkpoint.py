"""A checkpoint restores the run on any number of ranks, and nothing half-written, damaged or foreign is ever taken for one."""

import errno
import json
import math
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from data.types import Amount, LaneCursor
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.toy import LANES, build, rows, toy_args
from train import checkpoint
from train.args import CheckpointArgs
from train.checkpoint import Checkpoints, SaveInBackground, Start, complete_steps
from train.distributed.collectives import all_sum, rank, world_size
from train.distributed.sharding import grad_norm
from train.optim import clip_factor, set_learning_rates
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
        norms.append(float(grad_norm(state.model.parameters())))
        state.optimizer.step(factor=clip_factor(norms[-1], 1.0))
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
    checkpoints = Checkpoints.build(args.checkpoint, args.flat(), 60)
    assert checkpoints.asynchronous
    start = checkpoints.open(args.checkpoint)
    if start is not None:
        checkpoints.restore(state, start)
    norms = advance(state, before)
    if before:
        checkpoints.save(state)
    norms += advance(state, after)  # while it is written
    checkpoints.finish()
    return summary(state, norms)


def assert_same(a: dict[str, Any], b: dict[str, Any], *, exact: bool) -> None:
    own = () if exact else ("generators",)  # each rank's
    assert all(b["progress"][key] == value for key, value in a["progress"].items() if key not in own)
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
    assert set(manifest["files"]) == {"args.json", "data.json", "state/index.json", "state/0.safetensors"}
    stored, held = load_file(step / "state" / "0.safetensors"), state.tensors()
    assert {key.partition("@")[0] for key in stored} == set(held)
    assert all(torch.equal(x, held[key.partition("@")[0]]) for key, x in stored.items())


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
    data = newest / "state" / "0.safetensors"
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
        "write_pieces": killed,
        "write_index": killed,
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
    state = build(toy_args(), sharded=False)
    for name, message in (
        ("0.safetensors", r"0\.safetensors: optim\.exp_avg_sq\..* changed since it was written"),
        ("index.json", r"state/index\.json changed since it was written; delete 0000001"),
    ):
        file = tmp_path / "0000001" / "state" / name
        content = bytearray(file.read_bytes())
        content[-10] ^= 1
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            checkpoints.restore(state, Start(path=tmp_path / "0000001"))


def test_a_save_in_the_background_holds_what_was_there_when_it_began(tmp_path: Path) -> None:
    state = build(toy_args(), sharded=False)
    checkpoints = Checkpoints(tmp_path, 0, asynchronous=True)
    expected = {}
    for _ in range(2):
        advance(state, 1)
        checkpoints.save(state)
        expected[state.step] = {name: x.clone() for name, x in state.tensors().items()}
        with torch.no_grad():
            for x in state.tensors().values():
                x.zero_()
    checkpoints.finish()
    for step, tensors in expected.items():
        Checkpoints(tmp_path, 0).restore(state, Start(path=tmp_path / f"{step:07d}"))
        assert all(torch.equal(state.tensors()[name], x) for name, x in tensors.items())


def test_torch_draws_on_where_it_stopped(tmp_path: Path) -> None:
    checkpoints = saved(tmp_path, 1)
    expected = torch.rand(3)
    checkpoints.restore(build(toy_args(), sharded=False), Start(path=tmp_path / "0000001"))
    assert torch.equal(torch.rand(3), expected)


def fail_in_the_background(folder: str) -> tuple[bool, str, str, list[str]]:
    """The disk of rank 1 is full; the ranks hear of it in the next step's counts."""
    state = build(toy_args(min_unit_params=0))
    checkpoints = Checkpoints(Path(folder), 0, asynchronous=True, timeout_s=30)
    hook = SaveInBackground(checkpoints)
    checkpoints.save(state)
    checkpoints.finish()
    write = checkpoint.write_pieces

    def full(*args: Any) -> Any:
        if rank() == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*args)

    checkpoint.write_pieces = full
    state.step = 1
    checkpoints.save(state)
    asked = 0.0
    deadline = time.monotonic() + 30
    while not asked and time.monotonic() < deadline:
        asked = float(all_sum(torch.tensor(float(hook.asks()))))  # as it rides along in the loop
    try:
        hook.heard(state)
        message = ""
    except ValueError as error:
        message = str(error)
    checkpoint.write_pieces = write
    checkpoints.save(state)  # it is told once, and the next one works
    checkpoints.finish()
    return bool(asked), message, Checkpoints(Path(folder), 0).latest().name, sorted(os.listdir(folder))


def test_a_failure_in_the_background_is_told_by_every_rank(tmp_path: Path) -> None:
    first, second = run_distributed(fail_in_the_background, 2, str(tmp_path))
    assert first == second
    asked, message, latest, there = first
    assert asked and "0000001.tmp: rank 1 cannot write: No space left on device" in message
    assert (latest, there) == ("0000001", ["0000000", "0000001"])


def test_where_there_is_no_memory_for_a_copy_the_way_without_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any, **__: Any) -> Any:
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(checkpoint.Saver, "take", none_left)
    state = build(toy_args(), sharded=False)
    for asynchronous in (True, False):
        checkpoints = Checkpoints(tmp_path, 0, asynchronous=asynchronous)
        with pytest.raises(ValueError, match="cannot copy its share aside: MemoryError") as caught:
            checkpoints.save(state)
            checkpoints.finish()
        assert ("--async_checkpoint False saves without a copy" in str(caught.value)) == asynchronous


def test_flags_say_how_is_saved(tmp_path: Path) -> None:
    state = build(toy_args(), sharded=False)
    flags = CheckpointArgs(checkpoint_dir=str(tmp_path), async_checkpoint=False, max_checkpoints=1, keep_best="ce",
                           keep_best_mode="max")  # fmt: skip
    checkpoints = Checkpoints.build(flags, {}, 60)
    hook = SaveInBackground(checkpoints)
    for step, ce in ((1, 2.0), (2, 1.0), (3, 1.5)):
        state.step = step
        report = SimpleNamespace(loss=9.0, losses={"ce": ce, "mse": 0.0}, counts={"ce": 4, "mse": 0})
        hook.after_step(state, report)  # type: ignore[arg-type]
        checkpoints.save(state)
        assert (tmp_path / f"{step:07d}").is_dir()  # at once
    assert [path.name for path in complete_steps(tmp_path)] == ["0000001", "0000003"]
    manifest = json.loads((tmp_path / "0000003" / "manifest.json").read_text())
    assert manifest["figures"] == {"loss": 9.0, "ce": 1.5}


def test_the_best_step_is_kept_besides_the_newest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = build(toy_args(), sharded=False)
    lowest, highest = (
        Checkpoints(tmp_path / mode, 2, keep_best="val/ce", best_is_highest=mode == "max")
        for mode in ("min", "max")
    )
    # Step 2 was validated twice: the newest counts. Step 4 has none, step 6 ends with one that is not finite.
    figures = {1: [5.0], 2: [1.0, 2.0], 3: [4.0], 4: [], 5: [3.0], 6: [1.0, math.nan]}
    for step, values in figures.items():
        state.step = step
        for checkpoints in (lowest, highest):
            for value in values:
                checkpoints.note({"val/ce": value, "loss": value})
            checkpoints.save(state)
    # Losses of steps are averaged, as far as they are finite.
    for step, losses in ((2, 1.5), (6, 1.0)):
        manifest = json.loads((tmp_path / "min" / f"{step:07d}" / "manifest.json").read_text())
        assert manifest["figures"].pop("loss") == losses
        assert manifest["figures"] == ({"val/ce": 2.0} if step == 2 else {})
    assert "--keep_best val/ce: no such figure since the checkpoint before; there were: none" in caplog.text
    for mode, best in (("min", 2), ("max", 1)):
        steps = [path.name for path in complete_steps(tmp_path / mode)]
        assert steps == [f"{best:07d}", "0000005", "0000006"]
    assert json.loads((tmp_path / "min" / "best.json").read_text()) == {"step": 2, "val/ce": 2.0}
    # A run that goes on knows it from the files.
    state.step = 7
    again = Checkpoints(tmp_path / "min", 1, keep_best="val/ce")
    again.note({"val/ce": 1.5})
    again.save(state)
    assert [path.name for path in complete_steps(tmp_path / "min")] == ["0000007"]


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


def test_a_run_that_is_refused_deletes_nothing(tmp_path: Path) -> None:
    """What is half-written there may be what the other run is writing."""
    checkpoints = saved(tmp_path)
    leftovers = [tmp_path / name for name in ("0000003.tmp", "0000001.old")]
    for path in leftovers:
        path.mkdir()
    with pytest.raises(ValueError, match="up to step 2"):
        checkpoints.open(CheckpointArgs())
    assert all(path.is_dir() for path in leftovers)
    checkpoints.open(CheckpointArgs(auto_resume=True))
    assert not any(path.exists() for path in leftovers)


def test_a_step_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    """Killed between putting the old one aside and the new one in its place."""
    checkpoints = saved(tmp_path)
    newest = tmp_path / "0000002"
    newest.rename(tmp_path / "0000002.weft_old")
    assert checkpoints.open(CheckpointArgs(auto_resume=True)) == Start(path=newest)
    # Killed a moment later: the new one is there, and what it replaces goes.
    (tmp_path / "0000002.weft_old").mkdir()
    assert checkpoints.open(CheckpointArgs(auto_resume=True)) == Start(path=newest)
    assert sorted(os.listdir(tmp_path)) == ["0000001", "0000002"]


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


def open_apart(folder: str) -> tuple[str, list[str]]:
    """On a directory that each rank has for itself; what stands there afterwards."""
    checkpoint.SHARED_WITHIN_S = 0.0
    own = Path(folder) / str(rank())
    try:
        Checkpoints(own, 0).open(CheckpointArgs())
    except ValueError as error:
        return str(error), os.listdir(own) if own.is_dir() else []
    return "", []


def test_a_directory_that_the_nodes_do_not_share_is_noticed_at_once(tmp_path: Path) -> None:
    (first, left), (second, _) = run_distributed(open_apart, 2, str(tmp_path))
    assert first.startswith(f"{tmp_path}/0: what rank 0 writes there is not seen by rank 1 on ")
    assert second.startswith(f"{tmp_path}/1: what rank 0 writes there is not seen by rank 1 on ")
    assert "a file system that all nodes share" in first and not left
