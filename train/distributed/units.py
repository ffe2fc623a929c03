"""Which modules are sharded alone, and what is done to them: the shard plan and the flags -> a table. No process is needed.

`shard_model` does what stands here; `--print_config` and `--validate_only` show it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

from torch import nn

from modeling.bagel.shard_plan import ShardUnit
from train.args import FsdpArgs
from train.distributed.mesh import mesh_shape

ROOT = ""
Rerun = Literal["", "full", "selective"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """A module that is gathered, run and freed as a whole.

    Attributes:
        fqn: its name; `ROOT` is the model.
        parameters, trained, size: in it and in no unit inside it; `size` in bytes, as stored.
        reshard: its gathered parameters are freed after forward.
        exact: see `ShardUnit`.
    """

    fqn: str
    parameters: int
    trained: int
    size: int
    reshard: bool
    exact: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A layer of a stack, whether it is a unit or not.

    Attributes:
        fqn: its name.
        rerun: how much of it is run again in backward: nothing, all, or its pieces but for their matrix products.
        compiled: its methods that are compiled.
        pieces: all of its pieces.
    """

    fqn: str
    rerun: Rerun
    compiled: tuple[str, ...]
    pieces: tuple[str, ...]


def units(model: nn.Module, plan: Sequence[ShardUnit], args: FsdpArgs) -> tuple[Unit, ...]:
    """The units, inner ones before outer ones, the root last.

    Args:
        model: whole, on any device; freezing must be done.
        plan: how it falls into units. One with fewer parameters of its own than `args.min_unit_params` joins the unit around it.
        args: strategy and smallest unit.

    Raises:
        ValueError: if a parameter is shared by modules of two units: each would gather and free it for itself.
    """
    keep = args.sharding_strategy in ("SHARD_GRAD_OP", "NO_SHARD")
    found: list[Unit] = []
    home: dict[int, str] = {}
    for unit in (*sorted(plan, key=lambda u: -u.fqn.count(".")), ShardUnit(ROOT, reshard=False)):
        own = [p for p in model.get_submodule(unit.fqn).parameters() if id(p) not in home]
        count = sum(p.numel() for p in own)
        least = 1 if unit.exact else max(1, args.min_unit_params)
        if unit.fqn != ROOT and count < least:
            continue
        home.update((id(p), unit.fqn) for p in own)
        found.append(
            Unit(
                fqn=unit.fqn,
                parameters=count,
                trained=sum(p.numel() for p in own if p.requires_grad),
                size=sum(p.numel() * p.element_size() for p in own),
                reshard=unit.reshard and not keep,
                exact=unit.exact,
            )
        )
    _require_ties_inside(model, [unit.fqn for unit in found], home)
    return tuple(found)


def layers(plan: Sequence[ShardUnit], args: FsdpArgs) -> tuple[Layer, ...]:
    """The layers that can be run again, in order, and what is done to each."""
    found = []
    for i, unit in enumerate(unit for unit in plan if unit.recompute):
        rerun: Rerun = ""
        if args.recompute and i % args.recompute_every == 0:
            # A layer without pieces cannot be run again in part.
            rerun = args.recompute_mode if unit.pieces else "full"
        compiled = unit.pieces if args.compile else ()
        found.append(Layer(fqn=unit.fqn, rerun=rerun, compiled=compiled, pieces=unit.pieces))
    return tuple(found)


def describe_units(model: nn.Module, plan: Sequence[ShardUnit], args: FsdpArgs, world_size: int) -> str:
    """A table for people: every unit, how much of it a rank keeps, and what happens to it in a step.

    Raises:
        ValueError: if the strategy does not fit the ranks.
    """
    replicas, shards = mesh_shape(args, world_size)
    how = {layer.fqn: layer for layer in layers(plan, args)}
    lines = [
        f"shard plan: {args.sharding_strategy}, {replicas} x {shards} ranks (replicas x shards), "
        f"{args.param_dtype} forward and backward, {args.reduce_dtype} sums, {args.output_dtype} outputs"
        + (", weights in host memory" if args.cpu_offload else ""),
        f"{'unit':<52}{'parameters':>20}{'trained':>16}{'MiB per rank':>14}  after forward",
    ]
    found = units(model, plan, args)
    for names, unit in _runs(found):
        layer = how.get(unit.fqn)
        notes = [
            "freed" if unit.reshard else "kept",
            *([f"{layer.rerun} recomputation"] if layer and layer.rerun else []),
            *(["compiled"] if layer and layer.compiled else []),
        ]
        times = f"{names.count} x " if names.count > 1 else ""
        mib = unit.size * names.count / shards / 2**20
        lines.append(
            f"{names.text:<52}{times + format(unit.parameters, ','):>20}{unit.trained:>16,}{mib:>14,.1f}  {', '.join(notes)}"
        )
    inside = [layer for layer in how.values() if layer.fqn not in {unit.fqn for unit in found}]
    if inside:
        again = sum(bool(layer.rerun) for layer in inside)
        lines.append(
            f"layers with fewer than --min_unit_params {args.min_unit_params:,}, in the unit around them: {len(inside)}"
            + (f", {again} of them with {args.recompute_mode} recomputation" if again else "")
            + (", all compiled" if args.compile else "")
        )
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class _Names:
    text: str
    count: int


def _runs(found: Iterable[Unit]) -> Iterator[tuple[_Names, Unit]]:
    """Units that differ in one number of their names only, as one row."""

    def alike(unit: Unit) -> tuple[str, Unit]:
        return re.sub(r"\.\d+$", ".{}", unit.fqn), replace(unit, fqn="")

    for (pattern, _), group in groupby(found, key=alike):
        same = list(group)
        first, last = same[0], same[-1]
        text = first.fqn or "(everything else)"
        if len(same) > 1:
            text = pattern.format(f"{first.fqn.rpartition('.')[2]}-{last.fqn.rpartition('.')[2]}")
        yield _Names(text, len(same)), first


def _require_ties_inside(model: nn.Module, fqns: Sequence[str], home: dict[int, str]) -> None:
    for name, p in model.named_parameters(remove_duplicate=False):
        inside = [fqn for fqn in fqns if fqn == ROOT or name.startswith(fqn + ".")]
        nearest, other = max(inside, key=len), home[id(p)]
        if nearest != other:
            raise ValueError(
                f"{name} lies in unit {nearest or 'the root'} and is tied to a parameter of {other or 'the root'}; tied weights "
                "must lie in one unit of the shard plan"
            )
