"""Where every record went: `read = trained + waiting + rejected`, per group.

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
    for cursor in cursors:
        read.update(cursor.read)
        waiting.update(group for group, _ in cursor.waiting)
        rejected.update({group: sum(reasons.values()) for group, reasons in cursor.rejected.items()})
    result = {
        group: Account(
            read=read[group], trained=trained.get(group, 0), waiting=waiting[group], rejected=rejected[group]
        )
        for group in sorted({*read, *trained})
    }
    for group, a in result.items():
        if a.read != a.trained + a.waiting + a.rejected:
            raise ValueError(
                f"group {group!r}: read {a.read} != trained {a.trained} + waiting {a.waiting} + "
                f"rejected {a.rejected}; the checkpoint's cursors and its count of trained samples do not belong together"
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
    """One line for the log: `vqa 120 = 110 + 8 + 2 | edit ...` (read = trained + waiting + rejected)."""
    each = (f"{g} {a.read} = {a.trained} + {a.waiting} + {a.rejected}" for g, a in all_accounts.items())
    return "read = trained + waiting + rejected: " + " | ".join(each)
