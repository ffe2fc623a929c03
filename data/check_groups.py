"""Faults that are not of one record: of the YAML (with its line), of files, of a whole group; copies and leaks.

For `data/check.py`. A fault is `(kind, group, Found)`, the kind a row of `CHECKS`.
"""

import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from data.mixture import Group, GroupSpec, load_mixture, load_validation
from data.scan import Found, Place, Scan, patient_of
from data.sources import ConcatSource
from data.stream import StreamPlan

GroupFault = tuple[str, str, Found]

Builder = Callable[[GroupSpec], Group]
"""Opens the data of a group."""

# ------------------------------------------------------------------------------------------------ the mixture


def open_mixture(file: Path, build: Builder, found: list[GroupFault]) -> tuple[Group, ...]:
    """The groups that can be opened; what is wrong with the others is added to `found`.

    Raises:
        ValueError: if no group is left.
    """
    faults: list[ValueError] = []
    with _told() as warnings:
        try:
            specs = load_mixture(file, faults=faults)
        except ValueError:
            if not faults:
                raise
            specs = ()
    lines = YamlLines(file)
    found += [_yaml_fault(file, str(fault), lines) for fault in faults]
    for warning in warnings:
        _, name, place = _yaml_fault(file, warning, lines)
        found.append(("no_effect", name, place))
    groups = [group for spec in specs if (group := _open(spec, build, lines, found)) is not None]
    if not groups:
        told = [place.message for _, _, places in found for place in places.first]
        raise ValueError(f"{file}: no group can be checked: {' | '.join(told)}")
    return tuple(groups)


def open_validation(file: Path, build: Builder, found: list[GroupFault]) -> tuple[Group, ...]:
    """Likewise those under `val`, if there are any; their names begin with `val.`.

    Raises:
        ValueError: as `load_validation`: one that cannot be read spoils them all.
    """
    lines = YamlLines(file)
    specs = [replace(spec, name=f"val.{spec.name}") for spec in load_validation(file)]
    return tuple(group for spec in specs if (group := _open(spec, build, lines, found)) is not None)


@contextmanager
def _told() -> Iterator[list[str]]:
    """What data/mixture.py warns of meanwhile."""
    logger, messages = logging.getLogger(load_mixture.__module__), list[str]()
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = True


def _yaml_fault(file: Path, text: str, lines: "YamlLines") -> GroupFault:
    path, _, message = text.removeprefix(f"{file}: ").partition(": ")
    key = re.search(r"(?:key|set|group) '([^']+)'", message)
    line = lines.of(f"{path}.{key.group(1)}" if key else path)
    by_end = {"dataset_names": "unknown_dataset", "weight": "wrong_weight", "num_used_data": "wrong_count"}
    kind = next((kind for end, kind in by_end.items() if f".{end}" in path), "bad_key")
    place = Place(line, f"{file}:{line}", f"{path}: {message}")
    return kind, path.partition(".")[0], Found(1, [place])


def _open(spec: GroupSpec, build: Builder, lines: "YamlLines", found: list[GroupFault]) -> Group | None:
    """The group, of those of its data sets that can be opened: one by one, so that each missing one is named."""
    parts: list[Group] = []
    where, line = lines.place(spec.name)
    for source in spec.sources:
        try:
            with _told() as warnings:
                part = build(replace(spec, sources=(source,)))
        except (ValueError, OSError) as e:
            message = str(e).removeprefix(f"group {spec.name!r}: ")
            location = source.location[source.path_key]
            is_of_the_data = os.path.dirname(location) in message
            at = lines.text_of(os.path.basename(location)) if is_of_the_data else line
            place = Place(at, f"{lines.file}:{at}", f"{source.dataset}: {message}")
            found.append(("missing_source" if is_of_the_data else "bad_key", spec.name, Found(1, [place])))
            if not is_of_the_data:
                return None
            continue
        parts.append(part)
        found += [("short_source", spec.name, Found(1, [Place(line, where, said)])) for said in warnings]
    if len(parts) < 2:
        return parts[0] if parts else None
    return replace(parts[0], source=ConcatSource([part.source for part in parts]))


class YamlLines:
    """On which line of a YAML file a key stands."""

    def __init__(self, file: Path):
        self.file = file
        self._text = file.read_text(encoding="utf-8").splitlines()
        self._lines: dict[str, int] = {}
        self._walk(yaml.compose("\n".join(self._text), yaml.SafeLoader), "")

    def of(self, path: str) -> int:
        """Line of the longest beginning of a dotted path that the file has."""
        while path and path not in self._lines:
            path = path.rpartition(".")[0]
        return self._lines.get(path, 1)

    def place(self, group: str) -> tuple[str, int]:
        """File and line of a group; of `vqa_part`, those of the part in `vqa`."""
        parts = [f"{group[:i]}.dataset_names.{group[i + 1 :]}" for i, c in enumerate(group) if c == "_"]
        line = next((self._lines[path] for path in (group, *parts) if path in self._lines), 1)
        return f"{self.file}:{line}", line

    def text_of(self, text: str) -> int:
        """First line that contains a text; 1 if none does."""
        return next((n for n, line in enumerate(self._text, 1) if text in line), 1)

    def _walk(self, node: yaml.Node | None, path: str) -> None:
        if not isinstance(node, yaml.MappingNode):
            return
        for key, value in node.value:
            place = f"{path}.{key.value}" if path else str(key.value)
            self._lines[place] = key.start_mark.line + 1
            self._walk(value, place)


# ------------------------------------------------------------------------------------ faults of a whole group


def group_faults(group: Group, scan: Scan, plan: StreamPlan, lines: YamlLines) -> Iterator[GroupFault]:
    """What its numbers say of a group."""
    where, line = lines.place(group.name)

    def one(kind: str, message: str) -> GroupFault:
        return kind, group.name, Found(1, [Place(line, where, f"{group.name}: {message}")])

    if group.weight == 0 and not group.is_mandatory:
        yield one("never_drawn", "weight 0")
        return
    if scan.records < plan.num_lanes:
        yield one("tiny_group", f"{scan.records:,} records on {plan.num_lanes} lanes")
    unusable = scan.looked_at - scan.usable
    if unusable > int(plan.max_reject_fraction * scan.looked_at):
        share = f"{unusable:,} of {scan.looked_at:,} records looked at ({unusable / scan.looked_at:.2%})"
        limit = f"--max_reject_fraction is {plan.max_reject_fraction}"
        yield one("too_many_rejects", f"{share} are unusable, {limit}")


def copies(group: Group, scan: Scan, keep: int) -> Iterator[GroupFault]:
    """Records of a group whose contents another one has; `keep` of them are named."""
    for kind, hashes, what in (
        ("duplicate_row", scan.hashes("rows"), "texts and pictures"),
        ("repeated_text", scan.hashes("texts"), "texts"),
    ):
        pairs = equal_pairs(hashes)
        if pairs:
            places = [
                Place(later, _where(group, later), f"the same {what} as {_where(group, first)}")
                for first, later in pairs[:keep]
            ]
            yield kind, group.name, Found(len(pairs), places)


def equal_pairs(hashes: np.ndarray) -> list[tuple[int, int]]:
    """(first record, later record) of every record that has the hash of an earlier one."""
    # A record that is read several times because num_used_data asks for it is no copy.
    hashes = hashes[np.sort(np.unique(hashes[:, 2], return_index=True)[1])]
    _, first, back = np.unique(hashes[:, 1], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[back] != np.arange(len(hashes)))
    return [(int(hashes[first[back[i]], 0]), int(hashes[i, 0])) for i in later]


def leaks(
    groups: Sequence[Group],
    scans: Mapping[str, Scan],
    others: Sequence[Group],
    their_scans: Mapping[str, Scan],
    keep: int,
) -> Iterator[GroupFault]:
    """Pictures, texts without pictures, and patients that groups of another mixture have as well; `keep` of each are named."""
    for kind, field, what in (
        ("leaked_picture", "pictures", "a picture of"),
        ("leaked_text", "texts", "the same texts as"),
        ("leaked_patient", "patients", "the same patient as"),
    ):
        known = {
            int(digest): (group, int(index))
            for group in reversed(others)
            for index, digest, _ in reversed(their_scans[group.name].hashes(field))
        }
        digests = np.array(list(known), np.uint64)
        for group in groups:
            hashes = scans[group.name].hashes(field)
            shared = hashes[np.isin(hashes[:, 1], digests)]
            # A record with two shared pictures is one record.
            shared = shared[np.unique(shared[:, 0], return_index=True)[1]]
            if len(shared):
                places = [
                    Place(
                        int(index),
                        _where(group, int(index)),
                        f"{what} {_where(*known[int(digest)])}{_whose(group, int(index))}",
                    )
                    for index, digest, _ in shared[:keep]
                ]
                yield kind, group.name, Found(len(shared), places)


def _whose(group: Group, index: int) -> str:
    patient = patient_of(group.source.read(index).data)
    return f" (patient {patient!r})" if patient else ""


def _where(group: Group, index: int) -> str:
    return group.source.read(index).where
