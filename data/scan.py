"""Read the records of a mixture once, as the trainer would, and note what there is to know about each: for `data/check.py`.

Every record goes through the trainer's own code (`data.stream.make_sample`), with the group's source wrapped so that the
pictures it opens are seen. Chunks of records are scanned by several processes; their notes are joined in the parent.
"""

import io
import multiprocessing
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, fields, replace
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from PIL import Image

from data.checks import Look, Seen, find_faults, kind_of
from data.dataset_base import DropoutSpec
from data.layout import loss_tokens, segment_tokens
from data.mixture import Group
from data.order import permute, stable_hash
from data.sources import Record, Source, SourceLost
from data.sources.record import IMAGE_ERRORS
from data.stream import StreamPlan, make_sample
from data.tokens import Tokenizer
from data.types import Kind, Reject, Sample, Segment

COLUMNS = ("all", "text", "und", "cond", "gen", "loss")
"""Token counts of a sample: in a pack; by the kind of segment, markers included; predictions it is trained on."""

KINDS: Mapping[Kind, str] = {"text": "text", "und_image": "und", "cond_image": "cond", "gen_image": "gen"}

CHUNK = 64
"""Records per job of a process."""

OUTLINES = 20_000
"""Samples per group whose outlines are kept, for the prediction of packs."""

NAME_KEYS = frozenset(
    ("path", "file_name", "image", "images", "input_img", "output_img", "id", "__key__", "meta", "from", "role", "mask",
     "segmentation", "main_task_type", "sub_task_type", "dataset")
)  # fmt: skip
"""Fields of a row that name things; what stands in the others is its text."""

Outline = tuple[tuple[Any, ...], ...]
"""A sample without its contents: per segment its length or size, and its other fields."""

_OTHER_FIELDS = tuple(f.name for f in fields(Segment) if f.name not in ("ids", "pixels"))


@dataclass(frozen=True, slots=True)
class Place:
    """A record with a fault."""

    index: int
    where: str
    message: str


@dataclass(slots=True)
class Found:
    """The faults of one kind in a group: how many records, and the first of them."""

    count: int = 0
    first: list[Place] = field(default_factory=list)


@dataclass(slots=True)
class Scan:
    """What is known of a group's records.

    Attributes:
        records: of the group.
        looked_at: how many of them were read.
        usable: how many gave a sample within the budget.
        tokens: `usable 6` int32, `COLUMNS`.
        faults: by kind.
        rows: `looked_at 2` uint64, record number and hash of its texts and pictures.
        texts: `k 2` uint64, the same of records without pictures (hash of the texts).
        pictures: `k 2` uint64, record number and hash of a picture's bytes.
        outlines: of samples in the order scanned; None for a record that gives no sample.
    """

    records: int
    looked_at: int = 0
    usable: int = 0
    tokens: np.ndarray = field(default_factory=lambda: np.zeros((0, len(COLUMNS)), np.int32))
    faults: dict[str, Found] = field(default_factory=dict)
    rows: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    texts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    pictures: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.uint64))
    outlines: list[Outline | None] = field(default_factory=list)

    def add(self, kind: str, place: Place, keep: int) -> None:
        found = self.faults.setdefault(kind, Found())
        found.count += 1
        if len(found.first) < keep:
            found.first.append(place)


def scan_groups(
    plan: StreamPlan,
    tokenizer: Tokenizer,
    *,
    samples: int | None,
    keep: int,
    num_workers: int,
    progress: Callable[[int, int], None],
) -> dict[str, Scan]:
    """Scan every group.

    Args:
        plan: the run's groups, layout and budget.
        tokenizer: of the model.
        samples: records per group, spread evenly at random; None = all.
        keep: how many records with a fault are named per kind and group.
        num_workers: processes; 0 scans in this one.
        progress: is told how many records were read, of how many.

    Raises:
        RuntimeError: if a process dies (a decoder that crashes, or memory).
    """
    jobs = [
        (g, indices) for g, group in enumerate(plan.groups) for indices in _chunks(group, samples, plan.seed)
    ]
    total = sum(len(indices) for _, indices in jobs)
    scans = {group.name: Scan(records=len(group.source)) for group in plan.groups}
    parts: dict[str, list[tuple[int, Scan]]] = {name: [] for name in scans}
    done = 0
    for number, part in _run(_Scanner(plan, tokenizer, keep), jobs, num_workers):
        parts[plan.groups[jobs[number][0]].name].append((number, part))
        done += part.looked_at
        progress(done, total)
    for name, scan in scans.items():
        _join(scan, [part for _, part in sorted(parts[name], key=lambda p: p[0])], keep)
    return scans


def _chunks(group: Group, samples: int | None, seed: int) -> Iterator[list[int]]:
    records = len(group.source)
    if samples is None or samples >= records:
        indices = list(range(records))
    else:
        key = stable_hash("check", seed, group.name)
        indices = sorted(permute(i, records, key) for i in range(samples))
    for start in range(0, len(indices), CHUNK):
        yield indices[start : start + CHUNK]


def _join(scan: Scan, parts: Sequence[Scan], keep: int) -> None:
    for part in parts:
        scan.looked_at += part.looked_at
        scan.usable += part.usable
        scan.outlines += part.outlines[: OUTLINES - len(scan.outlines)]
        for kind, found in part.faults.items():
            mine = scan.faults.setdefault(kind, Found())
            mine.count += found.count
            mine.first += found.first[: keep - len(mine.first)]
    for name in ("tokens", "rows", "texts", "pictures"):
        setattr(scan, name, np.concatenate([getattr(scan, name), *(getattr(p, name) for p in parts)]))


# -------------------------------------------------------------------------------------------------- processes


def _run(
    scanner: "_Scanner", jobs: Sequence[tuple[int, list[int]]], num_workers: int
) -> Iterator[tuple[int, Scan]]:
    if not num_workers or len(jobs) < 2:
        yield from ((number, scanner(*job)) for number, job in enumerate(jobs))
        return
    # As the trainer's data workers are started: forked from a small server that has imported everything once.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "data.scan"])
    workers = min(num_workers, len(jobs))
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(scanner,))
    with pool:
        waiting = {pool.submit(_scan, job): number for number, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                yield waiting[future], future.result()
        except BrokenProcessPool as e:
            raise RuntimeError(
                "a process that scanned died; --num_workers 0 scans in this one and shows where, fewer need less memory"
            ) from e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


_SCANNER: list["_Scanner"] = []
"""Of this process: sent once, not with every job."""


def _start(scanner: "_Scanner") -> None:
    torch.set_num_threads(1)
    _SCANNER[:] = [scanner]


def _scan(job: tuple[int, list[int]]) -> Scan:
    return _SCANNER[0](*job)


# ------------------------------------------------------------------------------------------------- one record


class _Watched:
    """A source that remembers the record it read last and the pictures that were opened of it."""

    def __init__(self, source: Source):
        self._source = source
        self.record: Record | None = None
        self.pictures: dict[str, Seen] = {}

    def __len__(self) -> int:
        return len(self._source)

    def read(self, index: int) -> Record:
        self.record, self.pictures = None, {}
        record = self._source.read(index)

        self.record = replace(record, fetch=_WatchedFetch(record.fetch, self.pictures))
        return self.record


class _WatchedFetch:
    """A record's `fetch` that notes what it read."""

    def __init__(self, fetch: Callable[[str], bytes], pictures: dict[str, Seen]):
        self._fetch, self._pictures = fetch, pictures

    def __call__(self, name: str) -> bytes:
        content = self._fetch(name)
        self._pictures[name] = look_at_picture(content)
        return content

    def __getattr__(self, name: str) -> Any:  # some can list folders
        return getattr(self._fetch, name)


class _Scanner:
    """Scans records of a group by number. Budgets, dropout and the limit of rejects are lifted: all is to be seen."""

    def __init__(self, plan: StreamPlan, tokenizer: Tokenizer, keep: int):
        self.tokenizer, self.keep, self.longest = tokenizer, keep, plan.budget.longest
        endless = 2**40
        self.plan = replace(
            plan,
            groups=tuple(replace(group, source=_Watched(group.source)) for group in plan.groups),
            budget=replace(plan.budget, expected=endless, maximum=endless, per_sample=endless),
            dropout=DropoutSpec(),
        )

    def __call__(self, number: int, indices: Sequence[int]) -> Scan:
        group = self.plan.groups[number]
        scan = Scan(records=len(group.source))
        counts: list[list[int]] = []
        hashes: dict[str, list[tuple[int, int]]] = {"rows": [], "texts": [], "pictures": []}
        for index in indices:
            counts += self._scan_record(group, index, scan, hashes)
        scan.tokens = np.array(counts, np.int32).reshape(-1, len(COLUMNS))
        for name, pairs in hashes.items():
            setattr(scan, name, np.array(pairs, np.uint64).reshape(-1, 2))
        return scan

    def _scan_record(
        self, group: Group, index: int, scan: Scan, hashes: Mapping[str, list[tuple[int, int]]]
    ) -> list[list[int]]:
        scan.looked_at += 1
        source = group.source
        assert isinstance(source, _Watched)
        try:
            made = make_record_sample(self.plan, group, index)
        except ValueError as e:  # a file that vanished, or a transform that does not suit the model
            where = source.record.where if source.record else group.name
            kind = "missing_source" if isinstance(e, SourceLost) else "transform"
            scan.add(kind, Place(index, where, _without(str(e), where)), self.keep)
            scan.outlines.append(None)
            return []
        rejected = (made.reason, made.message) if isinstance(made, Reject) else None
        sample = None if isinstance(made, Reject) else made
        counts = [] if sample is None else self._count(sample)
        if source.record is None:
            assert isinstance(made, Reject)
            faults, where = {kind_of(made.reason): made.message}, made.where
        else:
            where = source.record.where
            look = Look(
                record=source.record,
                pictures=source.pictures,
                sample=sample,
                tokens=counts[0] if counts else 0,
                longest=self.longest,
                tokenizer=self.tokenizer,
            )
            faults = find_faults(look, rejected)
            _hash_record(look, index, hashes)
        for kind, message in faults.items():
            scan.add(kind, Place(index, where, _without(message, where)), self.keep)
        scan.outlines.append(None if sample is None else outline(sample))
        fits = bool(counts) and counts[0] <= self.longest
        scan.usable += fits
        return [counts] if fits else []

    def _count(self, sample: Sample) -> list[int]:
        by_kind = dict.fromkeys(COLUMNS, 0)
        for segment in sample.segments:
            tokens = segment_tokens(segment, self.plan.layout)
            by_kind["all"] += tokens
            by_kind[KINDS[segment.kind]] += tokens
        by_kind["loss"] = loss_tokens(sample, self.plan.layout)
        return list(by_kind.values())


def make_record_sample(plan: StreamPlan, group: Group, index: int) -> Sample | Reject:
    """The sample of record `index`, whatever its place in the order is."""
    return make_sample(plan, replace(group, source=_Pinned(group.source, index)), 0, index)


@dataclass(frozen=True, slots=True)
class _Pinned:
    """Reads one record, whichever the group's order asks for."""

    source: Source
    index: int

    def __len__(self) -> int:
        return len(self.source)

    def read(self, index: int) -> Record:
        return self.source.read(self.index)


def look_at_picture(content: bytes) -> Seen:
    """What a picture's file says before it is decoded."""
    size, orientation = (0, 0), 1
    try:
        with Image.open(io.BytesIO(content)) as image:
            size = image.size
            orientation = int(image.getexif().get(0x0112, 1)) if "exif" in image.info else 1
    except IMAGE_ERRORS:
        pass  # the record is rejected for it
    return Seen(size=size, orientation=orientation, digest=_hash64(content))


def texts_of(value: Any) -> Iterator[str]:
    """Every text of a row, in order."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key not in NAME_KEYS:
                yield from texts_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from texts_of(inner)


def _hash_record(look: Look, index: int, hashes: Mapping[str, list[tuple[int, int]]]) -> None:
    row = look.record.data
    row = (
        {"annotations": row["annotations"]} if "annotations" in row else row
    )  # the categories are all records'
    text = "\x1f".join(texts_of(row)).encode("utf-8", "surrogatepass")
    digests = [seen.digest for seen in look.pictures.values()]
    if digests:
        hashes["rows"].append((index, _hash64(text + b"".join(d.to_bytes(8, "little") for d in digests))))
        hashes["pictures"].extend((index, digest) for digest in digests)
    elif text:
        hashes["texts"].append((index, _hash64(text)))


def _hash64(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _without(message: str, where: str) -> str:
    """The message without the place it begins with: that is shown beside it."""
    message = " ".join(message.split())
    return message.partition(where)[2].lstrip(": ") or message


# --------------------------------------------------------------------------------------------------- outlines


def outline(sample: Sample) -> Outline:
    """What packing needs of a sample: no ids and no pixels."""
    return tuple(
        (len(s.ids), *s.pixels.shape[1:], *(getattr(s, name) for name in _OTHER_FIELDS))
        for s in sample.segments
    )


def from_outline(drawn: Outline) -> Sample:
    """A sample of the same layout; its ids and pixels are zeros that share their memory."""
    segments = []
    for length, height, width, *others in drawn:
        segments.append(
            Segment(
                ids=_ZERO_ID.expand(length),
                pixels=_ZERO_PIXEL.expand(3, height, width),
                **dict(zip(_OTHER_FIELDS, others, strict=True)),
            )
        )
    return Sample(segments=tuple(segments))


_ZERO_ID = torch.zeros(1, dtype=torch.int64)
_ZERO_PIXEL = torch.zeros(1, 1, 1, dtype=torch.uint8)
