"""Where every record went: `read = trained + waiting + rejected + lost`, per group; only `--packer upstream_compat` loses any.

    python -m data.ledger RUN [--step N] [--json]      # of a run's newest checkpoint; exits with 1 if the law is broken

In: the cursors of all lanes as they stand after a step, and what was trained on, counted apart from them from the tensors of
every consumed pack (`count_trained`) and summed over ranks. Out: the accounts in samples, tokens and loss-bearing tokens,
checked; lines for the log and for people; values for TensorBoard.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from data.sources import TooManyRejects
from data.stdout import nobody_reads
from data.types import Amount, LaneCursor, PackedBatch, amounts_from_json

DATA_FILE = "data.json"
"""Of a checkpoint: step, lane cursors, what was trained on, and what was asked for."""

NOT_FINITE, BESIDE_NOT_FINITE = "not_finite", "beside_not_finite"
"""Reasons for which a step's samples were written off: their own loss was not finite, or another's was (train/nonfinite.py)."""

STEP_NAME = re.compile(r"\d{7,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """What became of one group's records; `rejected` by reason."""

    read: Amount
    trained: Amount = Amount()
    waiting: Amount = Amount()
    rejected: Mapping[str, Amount] = field(default_factory=dict)
    lost: Amount = Amount()

    @property
    def all_rejected(self) -> Amount:
        return sum(self.rejected.values(), Amount())

    @property
    def is_lawful(self) -> bool:
        """Whether everything that was read is somewhere, once."""
        return self.read == self.trained + self.waiting + self.all_rejected + self.lost


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What the mixture asked of a group.

    Attributes:
        weight: relative to the other groups.
        records: of the group, one epoch.
        is_mandatory: a sample of it is in every pack besides.
    """

    weight: float
    records: int
    is_mandatory: bool = False

    def to_json(self) -> dict[str, Any]:
        return {"weight": self.weight, "records": self.records, "is_mandatory": self.is_mandatory}


def count_trained(batch: PackedBatch) -> dict[str, Amount]:
    """What a consumed pack trains on, by group: counted from its tensors, not from the sizes that the packer went by."""
    result: dict[str, Amount] = {}
    for origin, amount in zip(batch.origins, sample_amounts(batch), strict=True):
        add_amounts(result, {origin.group: amount})
    return result


def sample_amounts(batch: PackedBatch) -> list[Amount]:
    """The same of every sample."""
    ends = torch.tensor(batch.sample_lens, dtype=torch.int64).cumsum(0)
    loss_at = torch.cat([batch.label_index.cpu(), batch.gen_index.cpu()[batch.gen_timestep.cpu() > 0]])
    loss_tokens = _per_sample(loss_at, ends)
    return [Amount(1, n, predictions) for n, predictions in zip(batch.sample_lens, loss_tokens, strict=True)]


def _per_sample(places: Tensor, ends: Tensor) -> list[int]:
    """How many of the places are in each sample."""
    sample = torch.searchsorted(ends, places, right=True)
    return torch.bincount(sample, minlength=len(ends)).tolist()


def add_amounts(into: dict[str, Amount], more: Mapping[str, Amount]) -> None:
    """Add amounts by name."""
    for name, amount in more.items():
        into[name] = into.get(name, Amount()) + amount


def accounts(
    cursors: Iterable[LaneCursor],
    trained: Mapping[str, Amount],
    written_off: Mapping[str, Mapping[str, Amount]] = MappingProxyType({}),
) -> dict[str, Account]:
    """The account of every group.

    Args:
        cursors: of all lanes.
        trained: what went through a training step, by group.
        written_off: what was packed and not trained on because a loss was not finite, by group and reason: rejected, too.

    Raises:
        ValueError: if the law does not hold for a group: a sample was lost or used twice.
    """
    result = unchecked_accounts(cursors, trained, written_off)
    for group, a in result.items():
        if not a.is_lawful:
            raise ValueError(
                f"group {group!r}: {_broken(a)}; the checkpoint's cursors and its count of trained samples do not belong together"
            )
    return result


def unchecked_accounts(
    cursors: Iterable[LaneCursor],
    trained: Mapping[str, Amount],
    written_off: Mapping[str, Mapping[str, Amount]],
) -> dict[str, Account]:
    """The account of every group, whether the law holds or not."""
    read: dict[str, Amount] = {}
    waiting: dict[str, Amount] = {}
    rejected = {group: dict(reasons) for group, reasons in written_off.items()}
    lost: dict[str, Amount] = {}
    for cursor in cursors:
        add_amounts(read, cursor.read)
        add_amounts(lost, cursor.lost)
        for ticket in cursor.waiting:
            add_amounts(waiting, {ticket.group: ticket.amount})
        for group, reasons in cursor.rejected.items():
            add_amounts(rejected.setdefault(group, {}), reasons)
    return {
        group: Account(
            read=read.get(group, Amount()),
            trained=trained.get(group, Amount()),
            waiting=waiting.get(group, Amount()),
            rejected=rejected.get(group, {}),
            lost=lost.get(group, Amount()),
        )
        for group in sorted({*read, *trained})
    }


def require_few_rejects(
    all_accounts: Mapping[str, Account], sizes: Mapping[str, int], max_fraction: float
) -> None:
    """Stop a run in which all lanes together rejected too much (each lane sees only its own).

    Args:
        all_accounts: of all groups.
        sizes: records per group.
        max_fraction: of a group's records that may be unusable.

    Raises:
        TooManyRejects: naming the group.
    """
    for group, a in all_accounts.items():
        beside = a.rejected.get(BESIDE_NOT_FINITE, Amount())  # nothing is wrong with these
        read, rejected = a.read.samples, (a.all_rejected - beside).samples
        limit = int(max_fraction * max(sizes[group], read))
        if rejected > limit:
            raise TooManyRejects(
                f"group {group!r}: {rejected} of {read} records read could not be used, the limit is "
                f"{limit}; see the rejects file, repair or remove them, or raise --max_reject_fraction"
            )


# ---------------------------------------------------------------------------------------------------- to be read


def format_accounts(all_accounts: Mapping[str, Account]) -> str:
    """One line for the log: `vqa 120 = 110 + 8 + 2 | edit ...` (read = trained + waiting + rejected; + lost, if any was)."""
    has_lost = any(a.lost.samples for a in all_accounts.values())
    columns = ["trained", "waiting", "rejected", *(["lost"] if has_lost else [])]
    each = (f"{g} {a.read.samples} = {_sum_of(a, 'samples', has_lost)}" for g, a in all_accounts.items())
    return f"read = {' + '.join(columns)}: " + " | ".join(each)


def format_shares(all_accounts: Mapping[str, Account], demands: Mapping[str, Demand]) -> str:
    """One line for the log: `vqa 25.0% 24.8% 31.2% | edit ...`."""
    each = (
        f"{group} {s['requested']:.1%} {s['samples']:.1%} {s['tokens']:.1%}"
        for group, s in shares(all_accounts, demands).items()
    )
    return "share of draws requested, of samples and of tokens trained on: " + " | ".join(each)


def format_lost(all_accounts: Mapping[str, Account]) -> str:
    """What the packer lost, for the end of a run; empty if nothing."""
    lost, read = (sum(getattr(a, c).samples for a in all_accounts.values()) for c in ("lost", "read"))
    if not lost:
        return ""
    share = (
        f"{lost} of {read} samples that were read ({lost / read:.2%}) were lost by --packer upstream_compat"
    )
    by_group = ", ".join(f"{g} {a.lost.samples}" for g, a in all_accounts.items() if a.lost.samples)
    return f"{share}, which no step has trained on ({by_group}); --packer conserving loses none"


def shares(all_accounts: Mapping[str, Account], demands: Mapping[str, Demand]) -> dict[str, dict[str, float]]:
    """Every group's share: `requested` of the draws, `samples` and `tokens` of what was trained on; `epochs` that were read."""
    weights = sum(d.weight for d in demands.values())
    total = sum((a.trained for a in all_accounts.values()), Amount())
    result = {}
    for group, demand in demands.items():
        account = all_accounts.get(group, Account(read=Amount()))
        trained = account.trained
        result[group] = {
            "requested": demand.weight / weights,
            "samples": trained.samples / total.samples if total.samples else 0.0,
            "tokens": trained.tokens / total.tokens if total.tokens else 0.0,
            "epochs": account.read.samples / demand.records,
        }
    return result


def scalars(all_accounts: Mapping[str, Account], demands: Mapping[str, Demand]) -> dict[str, float]:
    """Values for TensorBoard: `ledger/<group>/<what>`."""
    values: dict[str, float] = {}
    for group, share in shares(all_accounts, demands).items():
        a = all_accounts.get(group, Account(read=Amount()))
        values |= {
            f"ledger/{group}/read": a.read.samples,
            f"ledger/{group}/trained": a.trained.samples,
            f"ledger/{group}/trained_tokens": a.trained.tokens,
            f"ledger/{group}/trained_loss_tokens": a.trained.loss_tokens,
            f"ledger/{group}/waiting": a.waiting.samples,
            f"ledger/{group}/rejected": a.all_rejected.samples,
            f"ledger/{group}/epochs": share["epochs"],
            f"ledger/{group}/share_requested": share["requested"],
            f"ledger/{group}/share_delivered": share["samples"],
            f"ledger/{group}/share_of_tokens": share["tokens"],
        }
        if a.lost.samples:
            values[f"ledger/{group}/lost"] = a.lost.samples
    return values


def report(
    all_accounts: Mapping[str, Account], demands: Mapping[str, Demand], title: str
) -> tuple[list[str], bool]:
    """The ledger for people, and whether the law holds for every group."""
    has_lost = any(a.lost.samples for a in all_accounts.values())
    columns = "trained + waiting + rejected" + (" + lost" if has_lost else "")
    lines = [title, f"{'group':<28}{'':<13}{'read':>14} = {columns}"]
    for group, a in all_accounts.items():
        for name in ("samples", "tokens", "loss_tokens"):
            read = f"{getattr(a.read, name):,}"
            lines.append(
                f"{group if name == 'samples' else '':<28}{name:<13}{read:>14} = {_sum_of(a, name, has_lost)}"
            )
        lines += [f"{'':<28}rejected: {n.samples:,} {reason}" for reason, n in sorted(a.rejected.items())]
        if not a.is_lawful:
            lines.append(f"{'':<28}BROKEN: {_broken(a)}")
    if demands:
        lines.append(f"{'share':<28}{'requested':>10}{'samples':>10}{'tokens':>10}{'epochs':>10}")
    for group, share in shares(all_accounts, demands).items():
        mandatory = "  + one in every pack" if demands[group].is_mandatory else ""
        lines.append(
            f"{group:<28}{share['requested']:>10.2%}{share['samples']:>10.2%}{share['tokens']:>10.2%}"
            f"{share['epochs']:>10.2f}{mandatory}"
        )
    return lines, all(a.is_lawful for a in all_accounts.values())


def _sum_of(a: Account, name: str, has_lost: bool) -> str:
    parts = [a.trained, a.waiting, a.all_rejected, *([a.lost] if has_lost else [])]
    return " + ".join(str(getattr(part, name)) for part in parts)


def _broken(a: Account) -> str:
    """Which sum is wrong."""
    name = next(
        n
        for n in ("samples", "tokens", "loss_tokens")
        if getattr(a.read, n) != sum(getattr(p, n) for p in (a.trained, a.waiting, a.all_rejected, a.lost))
    )
    unit = "" if name == "samples" else f" (in {name.replace('_', ' ')})"
    parts = (("trained", a.trained), ("waiting", a.waiting), ("rejected", a.all_rejected), ("lost", a.lost))
    return (
        f"read {getattr(a.read, name)} != "
        + " + ".join(f"{part} {getattr(amount, name)}" for part, amount in parts)
        + unit
    )


# ------------------------------------------------------------------------------------------------- of a run


def step_directories(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first.

    Args:
        run: `--results_dir`, `--checkpoint_dir`, or one step's directory.
    """
    if STEP_NAME.fullmatch(run.name) and (run / DATA_FILE).is_file():
        return [run]
    found = [
        path
        for folder in (run / "checkpoints", run)
        if folder.is_dir()
        for path in folder.iterdir()
        if STEP_NAME.fullmatch(path.name) and (path / DATA_FILE).is_file()
    ]
    return sorted(found, key=lambda path: int(path.name))


def read_checkpoint(path: Path) -> tuple[dict[str, Account], dict[str, Demand]]:
    """Accounts (unchecked) and demands of one step's directory.

    Raises:
        ValueError: if its file cannot be read.
    """
    file = path / DATA_FILE
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        cursors = [LaneCursor.from_json(lane) for lane in stored["lanes"]]
        trained = amounts_from_json(stored["trained"])
        written_off = {g: amounts_from_json(r) for g, r in stored.get("written_off", {}).items()}
        demands = {group: Demand(**demand) for group, demand in stored["demands"].items()}
    except (OSError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read as a checkpoint's data state ({e})") from e
    return unchecked_accounts(cursors, trained, written_off), demands


def main(argv: Sequence[str] | None = None) -> int:
    """Print the ledger of a run; 1 if the law is broken, 2 if there is nothing to print."""
    parser = argparse.ArgumentParser(prog="python -m data.ledger", description=__doc__.split("\n")[0])
    parser.add_argument(
        "run", type=Path, help="the run's --results_dir, its --checkpoint_dir, or one step's directory"
    )
    parser.add_argument("--step", type=int, help="which checkpoint (default: the newest)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args(argv)
    steps = {int(path.name): path for path in step_directories(args.run)}
    if not steps:
        sys.stderr.write(
            f"error: {args.run}: no checkpoint here; name a run's --results_dir or --checkpoint_dir\n"
        )
        return 2
    step = max(steps) if args.step is None else args.step
    if step not in steps:
        sys.stderr.write(
            f"error: {args.run}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}\n"
        )
        return 2
    try:
        all_accounts, demands = read_checkpoint(steps[step])
    except ValueError as e:
        sys.stderr.write(f"error: {e}\n")
        return 2
    lines, holds = report(all_accounts, demands, f"{steps[step]}: step {step}")
    if args.json:
        lines = [json.dumps(_to_json(step, all_accounts, demands, holds))]
    try:
        sys.stdout.writelines(f"{line}\n" for line in lines)
        sys.stdout.flush()
    except BrokenPipeError:
        nobody_reads()
    if not holds:
        sys.stderr.write("error: the law is broken: a sample was lost or used twice\n")
    return 0 if holds else 1


def _to_json(
    step: int, all_accounts: Mapping[str, Account], demands: Mapping[str, Demand], holds: bool
) -> dict[str, Any]:
    groups = {
        group: {
            "read": a.read.to_json(),
            "trained": a.trained.to_json(),
            "waiting": a.waiting.to_json(),
            "rejected": {reason: n.to_json() for reason, n in a.rejected.items()},
            "lost": a.lost.to_json(),
        }
        for group, a in all_accounts.items()
    }
    return {
        "step": step,
        "law_holds": holds,
        "columns": ["samples", "tokens", "loss_tokens"],
        "groups": groups,
        "shares": shares(all_accounts, demands),
    }


if __name__ == "__main__":
    sys.exit(main())
