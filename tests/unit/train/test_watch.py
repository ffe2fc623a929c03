"""What is looked at: the clock's phases, norms by group, profiles."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.distributed.toy import build, rows, toy_args
from tests.unit.train.test_config import DATA
from train.clock import BACKWARD, COMMUNICATION, Clock
from train.clock import DATA as WAITING
from train.config import parse_args
from train.distributed.session import World
from train.watch import Norms, Profile


def test_phases_add_up_and_an_inner_one_is_taken_out() -> None:
    clock = Clock()
    begun = time.perf_counter()
    with clock.phase(WAITING):
        time.sleep(0.01)
    with clock.phase(BACKWARD):
        time.sleep(0.01)
        with clock.phase(COMMUNICATION):
            time.sleep(0.03)
    spent = time.perf_counter() - begun
    found = clock.read()
    assert list(found) == [WAITING, COMMUNICATION, BACKWARD]
    assert sum(found.values()) <= spent
    assert found[COMMUNICATION] >= 0.03 and 0.01 <= found[BACKWARD] <= spent - 0.04
    assert clock.read() == {}, "each step by itself"


class Told:
    def __init__(self) -> None:
        self.values: dict[int, dict[str, float]] = {}

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self.values[step] = dict(values)


def test_norms_are_those_of_each_group() -> None:
    state, told = build(toy_args(), sharded=False), Told()
    hook = Norms(told, every=2)  # type: ignore[arg-type]
    inputs, targets = rows(5)
    (state.model(inputs).boxes - targets).square().mean().backward()
    hook.before_update(state)
    assert not told.values, "the first step is none of every second"
    state.step = 1
    hook.before_update(state)
    (found,) = told.values.values()
    names = {group["name"] for group in state.optimizer.param_groups}
    assert set(found) == {f"{tag}/{name}" for tag in ("gn", "wn") for name in names} and len(names) == 3
    total = torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None])
    assert sum(found[f"gn/{n}"] ** 2 for n in names) ** 0.5 == pytest.approx(float(total), rel=1e-6)
    tower = torch.cat([p.detach().flatten() for p in state.model.vit_model.parameters()])
    assert found["wn/vit"] == pytest.approx(float(tower.norm()), rel=1e-6)


def test_a_group_whose_biases_do_not_decay_is_one_group() -> None:
    def norms(**flags: object) -> dict[str, float]:
        state, told = build(toy_args(**flags), sharded=False), Told()
        inputs, targets = rows(5)
        (state.model(inputs).boxes - targets).square().mean().backward()
        Norms(told, every=1).before_update(state)  # type: ignore[arg-type]
        return told.values[1]

    apart = norms(no_decay_norm_bias=True)
    assert apart == pytest.approx(norms(), rel=1e-6) and len(apart) == 6


@pytest.mark.parametrize("last_step", [3, 2], ids=["to its end", "cut short"])
def test_a_profile_of_the_steps_asked_for(tmp_path: Path, last_step: int) -> None:
    world = World(rank=1, local_rank=0, size=2, device=torch.device("cpu"))
    hook, state, report = (
        Profile(tmp_path / "profile", 2, 4, world, memory=False),
        SimpleNamespace(step=0),
        None,
    )
    for step in range(1, last_step + 1):
        hook.before_step(state)  # type: ignore[arg-type]
        torch.ones(step, 7) @ torch.ones(7, 7)
        state.step += 1
        hook.after_step(state, report)  # type: ignore[arg-type]
    hook.close()
    events = json.loads((tmp_path / "profile" / "trace.1.json").read_text())["traceEvents"]
    shapes = [e["args"]["Input Dims"][0] for e in events if e["name"] == "aten::mm"]
    assert shapes == [[step, 7] for step in range(2, last_step + 1)]
    assert "aten::mm" in (tmp_path / "profile" / "operations.1.txt").read_text()


@pytest.mark.parametrize("given", ["3", "3:3", "0:2", "a:b", "4:2"])
def test_steps_to_profile_have_to_be_two(given: str) -> None:
    with pytest.raises(ValueError, match=f"--profile_steps {given}: expected A:B"):
        parse_args([*DATA, "--profile_steps", given])


def test_steps_to_profile() -> None:
    args: Any = parse_args([*DATA, "--profile_steps", "10:13"]).train
    assert args.profiled == (10, 13)
    with pytest.raises(ValueError, match="--memory_snapshot needs --profile_steps"):
        parse_args([*DATA, "--memory_snapshot"])
