"""Where every record went: `read = trained + waiting + rejected + lost`, per group; only `--packer upstream_compat` loses any.

In: the cursors of all lanes as they stand after a step, and the trained samples, counted apart from them
(`count_trained` of every consumed pack, summed over ranks). Out: the accounts, checked, and a line for the
log.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from data.types import LaneCursor, PackedBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Account:
    """Records of one group."""

    read: int
    trained: int
    waiting: int
    rejected: int
    lost: int = 0


def count_trained(batch: PackedBatch) -> Counter[str]:
    """Samples of a consumed pack per group."""
    return Counter(origin.group for origin in batch.origins)


def accounts(cursors: Iterable[LaneCursor], trained: Mapping[str, int]) -> dict[str, Account]:
    """The account of every group.

    Args:
        cursors: of all lanes.
        trained: samples per group that went through a training step.

    Raises:
        ValueError: if the law does not hold for a group: a sample was lost or used twice.
    """
    read: Counter[str] = Counter()
    waiting: Counter[str] = Counter()
    rejected: Counter[str] = Counter()
    lost: Counter[str] = Counter()
    for cursor in cursors:
        read.update(cursor.read)
        waiting.update(group for group, _ in cursor.waiting)
        rejected.update({group: sum(reasons.values()) for group, reasons in cursor.rejected.items()})
        lost.update(cursor.lost)
    result = {
        group: Account(
            read=read[group],
            trained=trained.get(group, 0),
            waiting=waiting[group],
            rejected=rejected[group],
            lost=lost[group],
        )
        for group in sorted({*read, *trained})
    }
    for group, a in result.items():
        if a.read != a.trained + a.waiting + a.rejected + a.lost:
            raise ValueError(
                f"group {group!r}: read {a.read} != trained {a.trained} + waiting {a.waiting} + "
                f"rejected {a.rejected} + lost {a.lost}; the checkpoint's cursors and its count of trained samples do not "
                "belong together"
            )
    return result


def require_few_rejects(
    all_accounts: Mapping[str, Account], sizes: Mapping[str, int], max_fraction: float
) -> None:
    """Stop a run in which all lanes together rejected too much (each lane sees only its own).

    Args:
        all_accounts: of all groups.
        sizes: records per group.
        max_fraction: of a group's records that may be unusable.

    Raises:
        ValueError: naming the group, the count and the limit.
    """
    for group, a in all_accounts.items():
        limit = int(max_fraction * max(sizes[group], a.read))
        if a.rejected > limit:
            raise ValueError(
                f"group {group!r}: {a.rejected} of {a.read} records read could not be used, the limit is "
                f"{limit}; see the rejects file, repair or remove them, or raise --max_reject_fraction"
            )


def format_accounts(all_accounts: Mapping[str, Account]) -> str:
    """One line for the log: `vqa 120 = 110 + 8 + 2 | edit ...` (read = trained + waiting + rejected; + lost, if any was)."""
    columns = ["trained", "waiting", "rejected"]
    if any(a.lost for a in all_accounts.values()):
        columns.append("lost")
    each = (
        f"{g} {a.read} = {' + '.join(str(getattr(a, c)) for c in columns)}" for g, a in all_accounts.items()
    )
    return f"read = {' + '.join(columns)}: " + " | ".join(each)


def format_lost(all_accounts: Mapping[str, Account]) -> str:
    """What the packer lost, for the end of a run; empty if nothing."""
    lost, read = (sum(getattr(a, c) for a in all_accounts.values()) for c in ("lost", "read"))
    if not lost:
        return ""
    share = (
        f"{lost} of {read} samples that were read ({lost / read:.2%}) were lost by --packer upstream_compat"
    )
    by_group = ", ".join(f"{g} {a.lost}" for g, a in all_accounts.items() if a.lost)
    return f"{share}, which no step has trained on ({by_group}); --packer conserving loses none"
