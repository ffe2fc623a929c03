"""A NaN in one sample, on two ranks: the sample is named, the run stops on both or goes on without the step, the ledger holds."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from data.ledger import sample_amounts
from data.packing import pack
from data.types import Amount, LaneCursor, Origin, PackedBatch
from modeling.types import FlowState
from tests.distributed.gather import full_tensors
from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import FIXED, SAMPLES, build_state
from tests.unit.modeling.tiny import SPEC, SPECIAL, made_up_latents, tiny_config
from train import nonfinite
from train.args import CheckpointArgs
from train.checkpoint import Checkpoints, Start
from train.config import build_args
from train.distributed.collectives import rank, world_size
from train.distributed.session import World
from train.loop import Run, check_accounts, train, training_step
from train.objective import Objective
from train.state import TrainState

BAD = Origin(group="draw", lane=1, position=12, where="pictures.tar:0012.png")
STEPS = 3


def lane_packs(lane: int) -> list[PackedBatch]:
    """A pack per step of a lane, with its cursor: a text, then two samples with target pictures. Lane 1's second has `BAD`."""
    packs, read = [], {}
    for step in range(STEPS):
        samples = []
        for place, kind in enumerate(("say", "draw", "edit")):
            position = 10 * step + 2 * place + lane - 1
            name = f"pictures.tar:{position:04d}.png"
            samples.append(
                replace(SAMPLES[kind](), origin=Origin(group=kind, lane=lane, position=position, where=name))
            )
        made = pack(samples, SPEC, SPECIAL)
        for origin, amount in zip(made.origins, sample_amounts(made), strict=True):
            read[origin.group] = read.get(origin.group, Amount()) + amount
        packs.append(replace(made, cursor=LaneCursor(lane=lane, packs=step + 1, read=dict(read))))
    return packs


def poisoned(batch: PackedBatch) -> FlowState:
    """Latents with one NaN, in the picture of `BAD`."""
    flow = made_up_latents(batch)
    for place, origin in enumerate(batch.origins):
        if origin == BAD:
            end = sum(batch.sample_lens[: place + 1])
            rows = (batch.gen_index >= end - batch.sample_lens[place]) & (batch.gen_index < end)
            flow.noised[rows.nonzero()[0], 0] = math.nan
    return flow


def poisoned_run(flags: dict[str, object]) -> tuple[Run, TrainState]:
    args = build_args({**FIXED, **flags})
    run = Run(
        args=args,
        world=World(rank=rank(), local_rank=rank(), size=world_size(), device=torch.device("cpu")),
        objective=Objective.build(args.loss.weights(), tiny_config().heads),
        encoder=poisoned,  # type: ignore[arg-type]
        journal=lambda step, packs: None,
        group_sizes=dict.fromkeys(SAMPLES, 100),
        flops=lambda pack: 0.0,
        peak_tflops=0.0,
    )
    return run, build_state(args, sharded=world_size() > 1)


def train_with_a_nan(folder: str, policy: str) -> dict[str, object]:
    """Three steps; what is left of them."""
    run, state = poisoned_run({"on_nonfinite": policy, "results_dir": folder, "max_reject_fraction": 0.5})
    weights, reports, error = [], [], ""
    batches = iter(lane_packs(rank()))
    try:
        for _ in range(STEPS):
            reports.append(training_step(run, state, batches))
            copies = ((n, p.detach().clone()) for n, p in state.model.named_parameters())
            weights.append(full_tensors(copies))
    except ValueError as e:
        error = str(e)
    result = {"reports": reports, "weights": weights, "error": error, "progress": state.progress()}
    return {**result, "accounts": check_accounts(run, state)}


def both_policies(folder: str) -> list[dict[str, object]]:
    return [train_with_a_nan(f"{folder}/{policy}", policy) for policy in ("skip", "stop")]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[list[dict]], Path]:
    folder = tmp_path_factory.mktemp("nonfinite")
    for policy in ("skip", "stop"):
        (folder / policy).mkdir()
    return run_distributed(both_policies, 2, str(folder)), folder


@pytest.mark.timeout(100)
def test_the_run_goes_on_without_the_step(ranks: tuple[list[list[dict]], Path]) -> None:
    skipped = ranks[0][0][0]
    before, bad, after = skipped["reports"]
    assert (before.step, bad.step, after.step) == (1, 2, 3) and not skipped["error"]
    assert math.isnan(bad.loss) and bad.log_entry()["loss"] is None and bad.log_entry().get("mse") is None
    assert math.isfinite(before.loss) and math.isfinite(after.loss)
    first, second, third = skipped["weights"]
    assert all(torch.equal(first[name], second[name]) for name in first), "the step changed something"
    assert any(not torch.equal(second[name], third[name]) for name in second)
    assert all(bool(x.isfinite().all()) for x in third.values())


def test_the_ledger_says_where_its_samples_are(ranks: tuple[list[list[dict]], Path]) -> None:
    for skipped, _ in ranks[0]:
        found = skipped["accounts"]
        assert all(account.is_lawful for account in found.values())
        assert {g: a.read.samples for g, a in found.items()} == {"say": 6, "draw": 6, "edit": 6}
        assert {g: a.trained.samples for g, a in found.items()} == {"say": 4, "draw": 4, "edit": 4}
        reasons = {g: {r: n.samples for r, n in a.rejected.items()} for g, a in found.items()}
        assert reasons == {
            "say": {"beside_not_finite": 2},
            "draw": {"beside_not_finite": 1, "not_finite": 1},
            "edit": {"beside_not_finite": 2},
        }
        stored = skipped["progress"]["written_off"]
        assert {g: sum(n[0] for n in r.values()) for g, r in stored.items()} == {
            "say": 2,
            "draw": 2,
            "edit": 2,
        }


def test_the_sample_is_named_and_its_pack_kept(ranks: tuple[list[list[dict]], Path]) -> None:
    folder = ranks[1] / "skip"
    lines = [json.loads(line) for line in (folder / "rejects.1.jsonl").read_text().splitlines()]
    (row,) = [line for line in lines if line["reason"] == "not_finite"]
    assert (row["group"], row["position"], row["where"]) == ("draw", 12, BAD.where)
    assert "mse" in row["message"]
    (about,) = json.loads((folder / "nonfinite" / "0000002.1.json").read_text())
    assert about["not_finite"] == {"1": ["mse"]} and about["origins"][1]["where"] == BAD.where
    tensors, expected = load_file(folder / "nonfinite" / "0000002.1.safetensors"), lane_packs(1)[1]
    assert torch.equal(tensors["0.text_ids"], expected.text_ids)
    assert torch.equal(tensors["0.gen_pixels.0"], expected.gen_pixels[0])
    assert not (folder / "nonfinite" / "0000002.0.json").exists(), "rank 0 had nothing to do with it"


def test_the_run_stops_on_both_ranks_with_the_same_line(ranks: tuple[list[list[dict]], Path]) -> None:
    lines = [stopped["error"] for _, stopped in ranks[0]]
    assert lines[0] == lines[1]
    assert lines[0].startswith(
        "step 2 is not finite: rank 1: mse of group 'draw', pictures.tar:0012.png (lane 1, position 12); kept in "
    )
    assert lines[0].endswith("or go on without the step: --on_nonfinite skip")
    assert [len(stopped["reports"]) for _, stopped in ranks[0]] == [1, 1]
    for _, stopped in ranks[0]:  # as after step 1: nothing of step 2 was taken
        assert {g: a.read.samples for g, a in stopped["accounts"].items()} == {"say": 2, "draw": 2, "edit": 2}


def test_what_was_trained_before_is_saved(tmp_path: Path) -> None:
    run, state = poisoned_run({"results_dir": str(tmp_path), "save_every": 100, "total_steps": 9})
    checkpoints = Checkpoints(tmp_path / "checkpoints", 0)
    quiet = SimpleNamespace(step=lambda _: None, note=lambda _: None)
    with pytest.raises(nonfinite.NotFinite, match="step 2 is not finite"):
        train(run, state, iter(lane_packs(1)), checkpoints, quiet)  # type: ignore[arg-type]
    start = checkpoints.open(CheckpointArgs(auto_resume=True))
    assert start == Start(path=tmp_path / "checkpoints" / "0000001")
    _, again = poisoned_run({})
    checkpoints.restore(again, start)
    assert again.step == 1 and again.cursors[1].packs == 1
    assert all(bool(x.isfinite().all()) for x in again.tensors().values())


def test_when_every_step_is_bad_the_run_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonfinite, "MAX_IN_A_ROW", 1)

    def broken(batch: PackedBatch) -> FlowState:
        flow = made_up_latents(batch)
        return replace(flow, noised=flow.noised * math.nan)

    monkeypatch.setitem(globals(), "poisoned", broken)
    found = train_with_a_nan(str(tmp_path), "skip")
    assert len(found["reports"]) == 1
    assert "nor were the 1 before it, so --on_nonfinite skip does not help" in found["error"]
