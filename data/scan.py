"""Read the records of a mixture once, as the trainer would, and note what there is to know about each: for `data/check.py`.

Every record goes through the trainer's own code (`data.stream.make_sample`), with the group's source wrapped so that the
files it reads are seen. Stretches of records are scanned by several processes; their notes are joined in the parent, in order.
"""

import io
import json
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
from data.order import stable_hash
from data.processes import fork_server, obey_signals
from data.sources import Record, Source, SourceLost
from data.sources.record import IMAGE_ERRORS, printable
from data.stream import StreamPlan, make_sample
from data.tokens import Tokenizer
from data.types import Kind, Reject, Sample, Segment

COLUMNS = ("all", "text", "und", "cond", "gen", "loss")
"""Token counts of a sample: in a pack; by the kind of segment, markers included; predictions it is trained on."""

KINDS: Mapping[Kind, str] = {"text": "text", "und_image": "und", "cond_image": "cond", "gen_image": "gen"}

CHUNK = 64
"""Records per job of a process, at least."""

JOBS_AHEAD = 4
"""Jobs per process that are under way or waiting."""

OUTLINES = 20_000
"""Samples per group whose outlines are kept, about, for the prediction of packs."""

NAME_KEYS = frozenset(
    ("path", "file_name", "img_path", "image", "images", "image_list", "input_img", "output_img", "video", "id", "__key__",
     "meta", "from", "role", "main_task_type", "sub_task_type", "dataset")
)  # fmt: skip
"""Fields of a row that name things; the texts in the others are its content."""

REGION_KEYS = ("bbox", "mask", "segmentation", "shapes")
"""Fields whose numbers are content too: rows may ask the same about different things."""

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
        faults: by kind.
        outlines: of some samples in the order scanned; None for a record that gives no sample.
        tokens: `COLUMNS` of one usable sample after the other.
        rows: number, hash of texts and pictures and hash of the place of one record after the other.
        texts: the same of records without pictures (hash of the texts).
        pictures: the same of every picture (hash of its bytes).
        patients: the same of records that name their patient.
    """

    records: int
    looked_at: int = 0
    usable: int = 0
    faults: dict[str, Found] = field(default_factory=dict)
    outlines: list[Outline | None] = field(default_factory=list)
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    rows: "array[int]" = field(default_factory=lambda: array("Q"))
    texts: "array[int]" = field(default_factory=lambda: array("Q"))
    pictures: "array[int]" = field(default_factory=lambda: array("Q"))
    patients: "array[int]" = field(default_factory=lambda: array("Q"))

    def token_table(self) -> np.ndarray:
        """`usable 6` int32, `COLUMNS`."""
        return np.array(self.tokens, np.int32).reshape(-1, len(COLUMNS))

    def hashes(self, name: str) -> np.ndarray:
        """`k 3` uint64, number, hash and hash of the place, of `rows`, `texts`, `pictures` or `patients`."""
        return np.array(getattr(self, name), np.uint64).reshape(-1, 3)

    def add(self, kind: str, place: Place, keep: int) -> None:
        found = self.faults.setdefault(kind, Found())
        found.count += 1
        if len(found.first) < keep:
            found.first.append(place)

    def join(self, part: "Scan", keep: int) -> None:
        """Add the notes of the next stretch."""
        self.looked_at += part.looked_at
        self.usable += part.usable
        self.outlines += part.outlines
        for kind, found in part.faults.items():
            mine = self.faults.setdefault(kind, Found())
            mine.count += found.count
            mine.first += found.first[: keep - len(mine.first)]
        for name in ("tokens", "rows", "texts", "pictures", "patients"):
            getattr(self, name).extend(getattr(part, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A stretch of a group's records, counted among those that are looked at.

    Attributes:
        group: place of the group in the mixture.
        start, stop: which.
        count: how many of the group are looked at.
        every: the outline of one of so many is kept.
        keep: faults of a kind that are named.
    """

    group: int
    start: int
    stop: int
    count: int
    every: int
    keep: int


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
        samples: records per group, spread over all of it; None = all.
        keep: how many records with a fault are named per kind and group.
        num_workers: processes; 0 scans in this one.
        progress: is told how many records were read, of how many.

    Raises:
        RuntimeError: if a process dies (a decoder that crashes, or memory).
    """
    counts = [min(samples or len(group.source), len(group.source)) for group in plan.groups]
    jobs = [job for number, count in enumerate(counts) for job in _jobs(number, count, keep)]
    scans = {group.name: Scan(records=len(group.source)) for group in plan.groups}
    done = 0
    for job, part in _run(_Scanner(plan, tokenizer), jobs, num_workers):
        scans[plan.groups[job.group].name].join(part, keep)
        done += part.looked_at
        progress(done, sum(counts))
    return scans


def _jobs(group: int, count: int, keep: int) -> Iterator[Job]:
    size, every = max(CHUNK, count // 1000), max(1, count // OUTLINES)
    for start in range(0, count, size):
        yield Job(
            group=group, start=start, stop=min(start + size, count), count=count, every=every, keep=keep
        )


# -------------------------------------------------------------------------------------------------- processes


def _run(scanner: "_Scanner", jobs: Sequence[Job], num_workers: int) -> Iterator[tuple[Job, Scan]]:
    """Every job with its scan, in the order of the jobs."""
    if not num_workers or len(jobs) < 2:
        yield from ((job, scanner(job)) for job in jobs)
        return
    context = fork_server(["torch", "data.scan"])
    workers = min(num_workers, len(jobs))
    ahead: deque[tuple[Job, Future[Scan]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(scanner,)) as pool:
        try:
            for job in jobs:
                ahead.append((job, pool.submit(_scan, job)))
                if len(ahead) == JOBS_AHEAD * workers:
                    yield _finished(ahead)
            while ahead:
                yield _finished(ahead)
        except BrokenProcessPool as e:
            raise RuntimeError(
                "a process that scanned died; --num_workers 0 scans in this one and shows where, fewer need less memory"
            ) from e
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _finished(ahead: "deque[tuple[Job, Future[Scan]]]") -> tuple[Job, Scan]:
    job, future = ahead.popleft()
    return job, future.result()


_SCANNER: list["_Scanner"] = []
"""Of this process: sent once, not with every job."""


def _start(scanner: "_Scanner") -> None:
    obey_signals()  # the pool terminates what is left when a process dies
    torch.set_num_threads(1)
    _SCANNER[:] = [scanner]


def _scan(job: Job) -> Scan:
    return _SCANNER[0](job)


# ------------------------------------------------------------------------------------------------- one record


class _Watched:
    """A source that remembers the record it read last and the files that were read for it."""

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
    """Scans records of a group. Budgets, dropout and the limit of rejects are lifted: all is to be seen."""

    def __init__(self, plan: StreamPlan, tokenizer: Tokenizer):
        self.tokenizer, self.longest = tokenizer, plan.budget.longest
        endless = 2**40
        self.plan = replace(
            plan,
            groups=tuple(replace(group, source=_Watched(group.source)) for group in plan.groups),
            budget=replace(plan.budget, expected=endless, maximum=endless, per_sample=endless),
            dropout=DropoutSpec(),
        )

    def __call__(self, job: Job) -> Scan:
        group = self.plan.groups[job.group]
        scan = Scan(records=len(group.source))
        for place in range(job.start, job.stop):
            drawn = self._scan_record(group, self._index(group, place, job), scan, job.keep)
            if place % job.every == 0:
                scan.outlines.append(drawn)
        return scan

    def _index(self, group: Group, place: int, job: Job) -> int:
        """Number of the `place`-th record that is looked at: one of every stretch of the file, at random."""
        first, last = (len(group.source) * p // job.count for p in (place, place + 1))
        return first + stable_hash("check", self.plan.seed, group.name, place) % (last - first)

    def _scan_record(self, group: Group, index: int, scan: Scan, keep: int) -> Outline | None:
        source = group.source
        assert isinstance(source, _Watched)
        scan.looked_at += 1
        try:
            made = make_record_sample(self.plan, group, index)
        except ValueError as e:  # a file that vanished, or a transform that does not suit the model
            where = source.record.where if source.record else group.name
            kind = "missing_source" if isinstance(e, SourceLost) else "transform"
            scan.add(kind, Place(index, where, _without(str(e), where)), keep)
            return None
        sample = None if isinstance(made, Reject) else made
        counts = [] if sample is None else self._count(sample)
        if source.record is None:
            assert isinstance(made, Reject)
            faults, where = {kind_of(made.reason): made.message}, made.where
        else:
            where = source.record.where
            look = Look(
                record=source.record,
                dataset=group.dataset,
                pictures=source.pictures,
                sample=sample,
                tokens=counts[0] if counts else 0,
                longest=self.longest,
                tokenizer=self.tokenizer,
            )
            faults = find_faults(look, (made.reason, made.message) if isinstance(made, Reject) else None)
            _hash_record(look, index, scan)
        for kind, message in faults.items():
            scan.add(kind, Place(index, where, _without(message, where)), keep)
        if counts and counts[0] <= self.longest:
            scan.usable += 1
            scan.tokens.extend(counts)
        return None if sample is None else outline(sample)

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
    size, orientation, mode = (0, 0), 1, ""
    try:
        with Image.open(io.BytesIO(content)) as image:
            size, mode = image.size, image.mode
            orientation = int(image.getexif().get(0x0112, 1)) if "exif" in image.info else 1
    except IMAGE_ERRORS:
        pass  # the record is rejected for it
    return Seen(size=size, orientation=orientation, mode=mode, digest=_hash64(content))


def content_of(value: Any) -> Iterator[str]:
    """Every text of a row, in order, and its regions."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            if key in REGION_KEYS:
                yield json.dumps(inner, default=str)
            elif key not in NAME_KEYS:
                yield from content_of(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from content_of(inner)


def _hash_record(look: Look, index: int, scan: Scan) -> None:
    if look.sample is None:  # a row without its pictures is no text
        return
    row = look.record.data
    where = _hash64(look.record.where.encode("utf-8", "surrogatepass"))
    note_patient(look.record, index, scan)
    row = (
        {"annotations": row["annotations"]} if "annotations" in row else row
    )  # the categories are all records'
    try:
        content = "\x1f".join(content_of(row)).encode("utf-8", "surrogatepass")
    except RecursionError:  # nested so deep that no honest row is a copy of it
        return
    digests = [seen.digest for seen in look.pictures.values()]
    for digest in digests:
        scan.pictures.extend((index, digest, where))
    if digests:
        content += b"".join(digest.to_bytes(8, "little") for digest in digests)
        scan.rows.extend((index, _hash64(content), where))
    elif content:
        scan.texts.extend((index, _hash64(content), where))


def note_patient(record: Record, index: int, scan: Scan) -> None:
    """Add whose picture a record shows."""
    if patient := patient_of(record.data):
        of_patient, where = (
            _hash64(text.encode("utf-8", "surrogatepass")) for text in (patient, record.where)
        )
        scan.patients.extend((index, of_patient, where))


def patient_of(row: Mapping[str, Any]) -> str:
    """Whose picture a record shows, if it says so."""
    photo = row.get("image")
    patient = row.get("patient_id", photo.get("patient_id") if isinstance(photo, dict) else None)
    return str(patient) if isinstance(patient, (int, str)) else ""


def _hash64(content: bytes) -> int:
    return int.from_bytes(blake2b(content, digest_size=8).digest(), "little")


def _without(message: str, where: str) -> str:
    """The message without the place it begins with: that is shown beside it."""
    message = " ".join(printable(message).split())
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
