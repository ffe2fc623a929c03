"""All that a run has to remember: weights, their average, optimizer, step, and where the data stands.

The learning rate is a function of the step, and every random choice about a sample one of its place, so neither has state. The
global generators of torch are kept for layers that draw from them (a dropout).
"""

import base64
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from data.ledger import Demand, add_amounts
from data.types import Amount, LaneCursor, Reject, amounts_from_json, amounts_to_json
from train.adamw import AdamW, kept_of
from train.distributed.collectives import gather_objects, rank, world_size
from train.ema import Ema
from train.loss_scale import LossScale


@dataclass(slots=True, kw_only=True)
class TrainState:
    """What a step changes and a checkpoint holds.

    Attributes:
        model, optimizer, ema: after sharding.
        cursors: of every lane; this rank keeps those of its own lanes up to date, in `consume`.
        step: steps done. One whose loss was not finite, or whose fp16 gradients overflowed, has updated nothing.
        packs_consumed: packs that all ranks together have taken.
        trained: what this rank has trained on, by group. The sum over ranks is what counts.
        written_off: likewise what it has packed and not trained on because a loss was not finite, by group and reason.
        skipped_in_a_row: steps that were skipped for that up to now, one after the other, in this run.
        demands: what the mixture asks of every group.
        loss_scale: what the loss is multiplied with before backward.
        unstored: names of parameters that stand in no checkpoint: frozen, and read again from where the run found them.
    """

    model: nn.Module
    optimizer: AdamW
    ema: Ema
    cursors: dict[int, LaneCursor]
    step: int = 0
    packs_consumed: int = 0
    trained: dict[str, Amount] = field(default_factory=dict)
    written_off: dict[str, dict[str, Amount]] = field(default_factory=dict)
    skipped_in_a_row: int = 0
    demands: Mapping[str, Demand] = field(default_factory=dict)
    loss_scale: LossScale = field(default_factory=LossScale)
    unstored: frozenset[str] = frozenset()

    @staticmethod
    def create(
        model: nn.Module,
        optimizer: AdamW,
        ema: Ema,
        num_lanes: int,
        demands: Mapping[str, Demand] | None = None,
        loss_scale: LossScale | None = None,
    ) -> "TrainState":
        """The state at the beginning of a run."""
        return TrainState(
            model=model,
            optimizer=optimizer,
            ema=ema,
            cursors={lane: LaneCursor(lane=lane) for lane in range(num_lanes)},
            demands=demands or {},
            loss_scale=loss_scale or LossScale(),
        )

    def consume(self, cursor: LaneCursor, trained: Mapping[str, Amount]) -> None:
        """Note a pack of this rank as trained on; `packs_consumed` counts all ranks' and is the loop's to raise."""
        self.cursors[cursor.lane] = cursor
        add_amounts(self.trained, trained)

    def write_off(self, cursor: LaneCursor, samples: Iterable[Reject]) -> None:
        """Note a pack of this rank as taken and not trained on."""
        self.cursors[cursor.lane] = cursor
        for sample in samples:
            add_amounts(self.written_off.setdefault(sample.group, {}), {sample.reason: sample.amount})

    def all_cursors(self) -> tuple[LaneCursor, ...]:
        """The newest cursor of every lane, over all ranks; every rank must call."""
        newest: dict[int, LaneCursor] = {}
        for cursors in gather_objects(self.cursors):
            for lane, cursor in cursors.items():
                if lane not in newest or cursor.packs > newest[lane].packs:
                    newest[lane] = cursor
        return tuple(newest[lane] for lane in sorted(newest))

    def all_trained(self) -> dict[str, Amount]:
        """What all ranks have trained on, by group; every rank must call."""
        result: dict[str, Amount] = {}
        for trained in gather_objects(self.trained):
            add_amounts(result, trained)
        return result

    def all_written_off(self) -> dict[str, dict[str, Amount]]:
        """What no rank has trained on because a loss was not finite, by group and reason; every rank must call."""
        result: dict[str, dict[str, Amount]] = {}
        for written_off in gather_objects(self.written_off):
            for group, reasons in written_off.items():
                add_amounts(result.setdefault(group, {}), reasons)
        return result

    def weights(self) -> dict[str, Tensor]:
        """Every parameter but `unstored`, as stored."""
        named = self.model.named_parameters()
        return {f"model.{n}": p.detach() for n, p in named if n not in self.unstored}

    def averages(self) -> dict[str, Tensor]:
        """The averaged weights, as stored."""
        return {f"ema.{n}": x for n, x in self.ema.averages.items()}

    def moments(self) -> dict[str, Tensor]:
        """The optimizer's tensors, as stored. Where it has not stepped yet, they are made, with the values it would give them."""
        names = {p: n for n, p in self.model.named_parameters()}
        tensors = {}
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                kept = kept_of(self.optimizer, group, p)
                tensors.update({f"optim.{key}.{names[p]}": x for key, x in kept.items()})
        return tensors

    def tensors(self, *, moments: bool = True) -> dict[str, Tensor]:
        """Everything that is stored as tensors, with or without the optimizer's: loading in place restores it."""
        return {**self.weights(), **self.averages(), **(self.moments() if moments else {})}

    def progress(self) -> dict[str, Any]:
        """Everything else, over all ranks, JSON-able; every rank must call."""
        return {
            "step": self.step,
            "packs_consumed": self.packs_consumed,
            "trained": amounts_to_json(self.all_trained()),
            "written_off": {g: amounts_to_json(r) for g, r in self.all_written_off().items()},
            "demands": {group: demand.to_json() for group, demand in self.demands.items()},
            "loss_scale": self.loss_scale.to_json(),
            "lanes": [cursor.to_json() for cursor in self.all_cursors()],
            "generators": gather_objects(generator_states()),
        }

    def load_progress(self, stored: Mapping[str, Any]) -> None:
        """Take over what `progress` gave, on any number of ranks."""
        self.step, self.packs_consumed = int(stored["step"]), int(stored["packs_consumed"])
        self.cursors = {int(lane["lane"]): LaneCursor.from_json(lane) for lane in stored["lanes"]}
        mine = stored if rank() == 0 else {}
        self.trained = amounts_from_json(mine.get("trained", {}))
        self.written_off = {g: amounts_from_json(r) for g, r in mine.get("written_off", {}).items()}
        self.loss_scale.load(stored["loss_scale"])
        # They belong to a rank: with another number of ranks, they begin with the seed.
        if len(stored["generators"]) == world_size():
            set_generator_states(stored["generators"][rank()])


def generator_states() -> dict[str, str]:
    """Torch's global generators of this rank, JSON-able. What decides about data does not use them; a layer may."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return {device: base64.b64encode(x.numpy().tobytes()).decode() for device, x in states.items()}


def set_generator_states(stored: Mapping[str, str]) -> None:
    """Take over what `generator_states` gave."""
    for device, text in stored.items():
        x = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if device == "cpu":
            torch.set_rng_state(x)
        elif torch.cuda.is_available():
            torch.cuda.set_rng_state(x)
