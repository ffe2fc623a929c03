"""Mixture YAML -> frozen `GroupSpec`s -> open `Group`s.

    vqa:                                  # name of the group, and of its class unless `type` is given
      type: vlm_sft                       # row of DATASET_REGISTRY
      dataset_names: [digits_vqa]         # or {part: [names]}: each part is a group `vqa_part` of its own
      weight: 1.0                         # or {part: weight}
      num_used_data: [0]                  # a count per name (0 = all) or {name: [start, end]}; or {part: ...}; Parquet: of files
      is_mandatory: false                 # true: one sample in every pack
      when_exhausted: repeat              # after its last record: repeat, drop (others go on) or stop (the run ends)
      epochs: 1                           # with drop and stop: how often its records are read
      vit_image_transform_args: {image_stride: 14, max_image_size: 980, min_image_size: 378}
      head_image_transform_args: {type: sam, image_size: 1024} # of a mask head with an encoder of its own (docs/segmentation.md)
      upstream_compat: false              # true: what the published code does, where that is odd
      max_turns: 4                        # every other key is an argument of the dataset class
    val:                                  # groups of validation: read once unless they say otherwise; a group that is named as
      vqa: {dataset_names: [digits_val]}  # one above has its type, transforms and class arguments where it gives none itself
    dataset_info:                         # where the data is, shaped as DATASET_INFO in data/dataset_info.py
      vlm_sft:
        digits_vqa: {data_dir: ../data, jsonl_path: ../data/vqa.jsonl}
        digits_val: {data_dir: ../data, jsonl_path: ../data/vqa_val.jsonl}

Paths are relative to the YAML file. `${NAME}` and `${NAME:default}` take environment variables.
"""

import logging
import os
import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from data.dataset_base import TaskDataset
from data.first_rows import require_video_reader
from data.options import require_type
from data.sources import FORMATS, LOCATION_KEYS, ConcatSource, SelectedSource, Source
from data.sources.indexed import IndexedSource
from data.sources.storage import is_remote
from data.tokens import Tokenizer
from data.transforms import build_transform

logger = logging.getLogger(__name__)

NOTE_KEYS = ("num_files", "num_total_samples")
"""Published locations carry these as notes."""

GROUP_KEYS = (
    "type", "dataset_names", "weight", "num_used_data", "is_mandatory", "image_transform_args",
    "vit_image_transform_args", "head_image_transform_args", "shuffle_lines", "shuffle_seed", "resume_data_status",
    "upstream_compat", "when_exhausted", "epochs",
)  # fmt: skip

NOT_GROUPS = ("dataset_info", "val")
"""Keys at the top level that are no group of the training mixture."""

OWN_KEYS = (
    "dataset_names", "weight", "num_used_data", "is_mandatory", "when_exhausted", "epochs", "shuffle_lines", "shuffle_seed",
    "resume_data_status", "augment",
)  # fmt: skip
"""What a group of validation does not take over from the training group of its name: which records, how often, how moved."""

WhenExhausted = Literal["repeat", "drop", "stop"]
"""What follows a group's last record: its first in another order, the other groups alone, or nothing at all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceSpec:
    """One named data set and which of its records are used.

    Attributes:
        dataset: its name in `dataset_names`.
        location: `data_dir` and the other keys of a data location, as absolute paths or URLs.
        format: how it is read, a row of `FORMATS`.
        path_key: which key of the location names the data.
        start: first record (of a format that counts files: first file).
        end: one past the last; None = all.
        shuffle_seed: the records are shuffled with this before the cut.
    """

    dataset: str
    location: Mapping[str, str]
    format: str
    path_key: str
    start: int = 0
    end: int | None = None
    shuffle_seed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupSpec:
    """One weighted entry of the mixture.

    Attributes:
        name: unique in the mixture; cursors and logs use it.
        dataset_class: makes the samples.
        weight: share of the draws, relative to the other groups.
        is_mandatory: one sample of it goes into every pack.
        epochs: how often its records are read; None: without end.
        when_exhausted: what then.
        sources: read one after the other as one list of records.
        options: further arguments of the dataset class.
        vae_transform, vit_transform, head_transform: arguments of the transforms.
    """

    name: str
    dataset_class: type[TaskDataset]
    weight: float
    is_mandatory: bool
    sources: tuple[SourceSpec, ...]
    options: Mapping[str, Any]
    vae_transform: Mapping[str, Any] | None = None
    vit_transform: Mapping[str, Any] | None = None
    head_transform: Mapping[str, Any] | None = None
    epochs: int | None = None
    when_exhausted: WhenExhausted = "repeat"


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """A `GroupSpec` with its files open: what a lane draws from."""

    name: str
    weight: float
    is_mandatory: bool
    dataset: TaskDataset
    source: Source
    epochs: int | None = None
    when_exhausted: WhenExhausted = "repeat"


def load_mixture(
    path: str | Path,
    registry: Mapping[str, type[TaskDataset]] | None = None,
    info: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    faults: list[ValueError] | None = None,
) -> tuple[GroupSpec, ...]:
    """Read and check a mixture YAML; opens no data.

    Args:
        path: the YAML file.
        registry: dataset classes by name (default: `DATASET_REGISTRY`).
        info: data locations by class and name (default: `DATASET_INFO`), after the YAML's own `dataset_info`.
        faults: if given, what is wrong with a group is added here and the group left out (`data/check.py` tells all at once).

    Raises:
        ValueError: naming the file, the key and the nearest valid one.
    """
    file = Path(path)
    content = _read_yaml(file)
    groups = {name: entry for name, entry in content.items() if name not in NOT_GROUPS}
    return _specs(file, groups, content, registry, info, faults)


def load_validation(
    path: str | Path,
    registry: Mapping[str, type[TaskDataset]] | None = None,
    info: Mapping[str, Mapping[str, Mapping[str, Any]]] | None = None,
    *,
    separate: bool = False,
) -> tuple[GroupSpec, ...]:
    """The groups that a run is validated on: those under `val`, or all of a file of their own. Opens no data.

    Args:
        path: the YAML file.
        registry, info: as `load_mixture` has them.
        separate: the file is of validation alone (`--val_dataset_config_file`): its groups stand at the top.

    Returns:
        the groups, read once unless they say otherwise; none if there is no `val`.

    Raises:
        ValueError: as `load_mixture`.
    """
    file = Path(path)
    content = _read_yaml(file)
    given = {k: v for k, v in content.items() if k not in NOT_GROUPS} if separate else content.get("val", {})
    if not isinstance(given, dict):
        raise ValueError(f"{file}: val: expected groups such as 'vlm_sft:', found {given!r}")
    if not given:
        return ()
    return _specs(
        file, {n: _of_validation(e, content.get(n)) for n, e in given.items()}, content, registry, info
    )


def _of_validation(entry: Any, training: Any) -> Any:
    """A group of validation with what it takes over from the training group of its name."""
    if not isinstance(entry, dict):
        return entry
    inherited = training if isinstance(training, dict) and entry is not training else {}
    kept = {key: value for key, value in inherited.items() if key not in OWN_KEYS}
    return {"when_exhausted": "drop", **kept, **entry}


def _specs(
    file: Path,
    groups: Mapping[str, Any],
    content: Mapping[str, Any],
    registry: Mapping[str, type[TaskDataset]] | None,
    info: Mapping[str, Mapping[str, Mapping[str, Any]]] | None,
    faults: list[ValueError] | None = None,
) -> tuple[GroupSpec, ...]:
    if registry is None or info is None:
        from data.dataset_info import DATASET_INFO, DATASET_REGISTRY  # it imports every dataset class

        registry, info = registry or DATASET_REGISTRY, info or DATASET_INFO
    own_info = content.get("dataset_info") or {}
    _require_locations(own_info, f"{file}: dataset_info", registry)
    specs: list[GroupSpec] = []
    for name, entry in groups.items():
        try:
            specs += _Entry(file, name, entry, registry, own_info, info).specs()
        except ValueError as e:
            if faults is None:
                raise
            faults.append(e)
    if not any(s.weight > 0 for s in specs):
        raise ValueError(f"{file}: no group with a weight above 0; add a group such as 'vlm_sft:'")
    return tuple(specs)


def build_groups(
    specs: Sequence[GroupSpec], tokenizer: Tokenizer, index_cache_dir: str | Path | None = None
) -> tuple[Group, ...]:
    """Open the data of every group and make its dataset object.

    Args:
        specs: of `load_mixture`.
        tokenizer: of the model.
        index_cache_dir: where indexes of the data are kept (default: see `data.sources.index.open_index`).

    Raises:
        ValueError: if a file is missing or empty, or a transform or a class refuses its arguments.
    """
    return tuple(_build_group(spec, tokenizer, index_cache_dir) for spec in specs)


def _build_group(spec: GroupSpec, tokenizer: Tokenizer, index_cache_dir: str | Path | None) -> Group:
    try:
        view = {} if spec.head_transform is None else {"head_transform": build_transform(spec.head_transform)}
        dataset = spec.dataset_class(
            tokenizer=tokenizer,
            vit_transform=None if spec.vit_transform is None else build_transform(spec.vit_transform),
            vae_transform=None if spec.vae_transform is None else build_transform(spec.vae_transform),
            **view,
            **spec.options,
        )
        _require_folders(spec)
        sources = [_open_source(s, index_cache_dir) for s in spec.sources]
        source = sources[0] if len(sources) == 1 else ConcatSource(sources)
        require_video_reader(dataset, source)
    except (ValueError, ImportError) as e:  # a format's or a store's package may be missing
        raise ValueError(f"group {spec.name!r}: {e}") from e
    return Group(
        name=spec.name,
        weight=spec.weight,
        is_mandatory=spec.is_mandatory,
        dataset=dataset,
        source=source,
        epochs=spec.epochs,
        when_exhausted=spec.when_exhausted,
    )


def _require_folders(spec: GroupSpec) -> None:
    """Where pictures are wanted: during a run, a folder that is not there counts as lost data and is waited for."""
    for source in spec.sources if spec.dataset_class.needs else ():
        folder = source.location.get("data_dir")
        if folder is not None and not is_remote(folder) and not os.path.isdir(folder):
            raise ValueError(
                f"{folder}: no such folder; check 'data_dir' of {source.dataset} in dataset_info"
            )


def _open_source(spec: SourceSpec, index_cache_dir: str | Path | None) -> Source:
    source = FORMATS[spec.format].open(spec.location, index_cache_dir)
    if FORMATS[spec.format].counts_files:
        return _chosen_files(spec, source)
    end = len(source) if spec.end is None else spec.end
    if end > len(source):
        logger.warning("%s: records up to %d are asked for, there are %d", spec.dataset, end, len(source))
    if spec.start == 0 and end >= len(source):
        return source
    try:
        return SelectedSource(source, spec.start, end, spec.shuffle_seed)
    except ValueError as e:
        raise ValueError(f"{spec.dataset}: {e}; change 'num_used_data'") from e


def _chosen_files(spec: SourceSpec, source: Source) -> Source:
    """The records of some of a source's files; after the last file comes the first again, as published."""
    assert isinstance(source, IndexedSource)
    edges = [0, *source.index.ends]
    count = len(edges) - 1
    end = count if spec.end is None else spec.end
    if spec.start >= count:
        raise ValueError(
            f"{spec.dataset}: file {spec.start} was asked for, there are {count}; change 'num_used_data'"
        )
    if end > count:
        logger.warning(
            "%s: %d files are asked for, there are %d: some are read more often", spec.dataset, end, count
        )
    if (spec.start, end) == (0, count):
        return source
    parts = [edges[i % count : i % count + 2] for i in range(spec.start, end)]
    return ConcatSource([SelectedSource(source, first, last) for first, last in parts if last > first])


# ----------------------------------------------------------------------------------------------- one YAML key


class _Entry:
    """One top-level key of the YAML, with what is needed to say where an error is."""

    def __init__(
        self,
        file: Path,
        name: str,
        entry: Any,
        registry: Mapping[str, type[TaskDataset]],
        own_info: Mapping[str, Mapping[str, Mapping[str, Any]]],
        info: Mapping[str, Mapping[str, Mapping[str, Any]]],
    ):
        self.file, self.name, self.where = file, name, f"{file}: {name}"
        if not isinstance(entry, dict):
            raise ValueError(f"{self.where}: expected keys such as 'dataset_names', found {entry!r}")
        self.entry = entry
        self.kind = entry.get("type", name)
        if not isinstance(self.kind, str) or self.kind not in registry:
            hint = "" if "type" in entry else " (or give it 'type:')"
            raise ValueError(
                f"{self.where}: no dataset class {self.kind!r}{_nearest(self.kind, registry)}{hint}"
            )
        self.dataset_class = registry[self.kind]
        self.own_locations, self.locations = own_info.get(self.kind) or {}, info.get(self.kind, {})
        self._check_keys()
        self.transforms = self._transforms()

    def _check_keys(self) -> None:
        options = self.dataset_class.options()
        for key in self.entry:
            if key not in GROUP_KEYS and key not in options:
                valid = [*GROUP_KEYS, *options]
                raise ValueError(f"{self.where}: unknown key {key!r}{_nearest(key, valid)}")
        required = ["dataset_names", *(k for k, p in options.items() if p.default is p.empty)]
        missing = [key for key in required if key not in self.entry]
        if missing:
            raise ValueError(
                f"{self.where}: the key {missing[0]!r} is missing; {self.kind} needs it, add it here"
            )
        for key, option in options.items():
            if key in self.entry and key not in GROUP_KEYS:
                require_type(self.entry[key], option.annotation, f"{self.where}.{key}")
        for key in ("is_mandatory", "shuffle_lines", "upstream_compat", "resume_data_status"):
            if not isinstance(value := self.entry.get(key, True), bool):
                raise ValueError(f"{self.where}.{key}: expected true or false, found {value!r}")
        seed = self.entry.get("shuffle_seed", 0)
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise ValueError(f"{self.where}.shuffle_seed: expected a whole number, found {seed!r}")
        if self.entry.get("resume_data_status") is False:
            logger.warning(
                "%s.resume_data_status: false has no effect, the data state is always resumed", self.where
            )

    def _transforms(self) -> dict[str, Mapping[str, Any]]:
        role_of = {
            "image_transform_args": self.dataset_class.image_transform_role,
            "vit_image_transform_args": "vit",
            "head_image_transform_args": "head",
        }
        given: dict[str, Mapping[str, Any]] = {}
        for key, role in role_of.items():
            block = self.entry.get(key)
            if block is None:
                continue
            if not isinstance(block, dict):
                raise ValueError(f"{self.where}.{key}: expected keys such as 'image_stride', found {block!r}")
            given[role] = block
            if role not in (*self.dataset_class.needs, "head"):
                logger.info(
                    "%s.%s: not used, %s needs no pictures for the %s",
                    self.where,
                    key,
                    self.kind,
                    role.upper(),
                )
        for role in self.dataset_class.needs:
            if role not in given:
                key = next(k for k, r in role_of.items() if r == role)
                raise ValueError(
                    f"{self.where}: the key {key!r} is missing, {self.kind} needs it for the {role.upper()}"
                )
        return given

    def specs(self) -> list[GroupSpec]:
        names = self.entry["dataset_names"]
        if not isinstance(names, dict):
            self._require_names(names, "dataset_names")
            return [
                self._spec(self.name, names, self.entry.get("weight", 1.0), self.entry.get("num_used_data"))
            ]
        if not names:
            raise ValueError(
                f"{self.where}.dataset_names: expected data set names, or parts with names, found {names!r}"
            )
        specs = []
        for part, part_names in names.items():
            self._require_names(part_names, f"dataset_names.{part}")
            weight = self._of_part("weight", part, names, 1.0)
            used = self._of_part("num_used_data", part, names, None)
            specs.append(self._spec(f"{self.name}_{part}", part_names, weight, used))
        return specs

    def _of_part(self, key: str, part: str, parts: Mapping[str, Any], default: Any) -> Any:
        value = self.entry.get(key, default)
        if not isinstance(value, dict):
            return value
        for given in value:
            if given not in parts:
                raise ValueError(f"{self.where}.{key}: no such group {given!r}{_nearest(given, parts)}")
        return value.get(part, default)

    def _require_names(self, names: Any, key: str) -> None:
        if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
            raise ValueError(f"{self.where}.{key}: expected a list of data set names, found {names!r}")

    def _spec(self, group: str, names: list[str], weight: Any, used: Any) -> GroupSpec:
        if not isinstance(weight, (int, float)) or isinstance(weight, bool) or not 0 <= weight < float("inf"):
            raise ValueError(f"{self.where}.weight: expected a number from 0, found {weight!r}")
        when_exhausted, epochs = self._end()
        as_published = self.entry.get("upstream_compat", False)
        files = FORMATS[self.dataset_class.source_format].counts_files
        ranges = used_ranges(
            used,
            names,
            f"{self.where}.num_used_data",
            unit="files" if files else "records",
            as_published=as_published,
        )
        if left_out := names[len(ranges) :]:
            logger.warning(
                "%s.num_used_data: has no number for %s; not used", self.where, ", ".join(left_out)
            )
        if files and self.entry.get("shuffle_lines") and any(r != (0, None) for r in ranges):
            raise ValueError(
                f"{self.where}.shuffle_lines: num_used_data counts files here, which are not shuffled; leave one of them out"
            )
        seed = self.entry.get("shuffle_seed", 0) if self.entry.get("shuffle_lines", False) else None
        options = {k: v for k, v in self.entry.items() if k not in GROUP_KEYS}
        for key in self.dataset_class.path_options:
            if isinstance(options.get(key), str) and options[key]:
                options[key] = os.path.normpath(self.file.resolve().parent / options[key])
        if as_published and "upstream_compat" in self.dataset_class.options():
            options["upstream_compat"] = True
        return GroupSpec(
            name=group,
            dataset_class=self.dataset_class,
            weight=float(weight),
            is_mandatory=self.entry.get("is_mandatory", False),
            sources=tuple(self._source(n, a, b, seed) for n, (a, b) in zip(names, ranges, strict=False)),
            options=options,
            vae_transform=self.transforms.get("vae"),
            vit_transform=self.transforms.get("vit"),
            head_transform=self.transforms.get("head"),
            epochs=epochs,
            when_exhausted=when_exhausted,
        )

    def _end(self) -> tuple[WhenExhausted, int | None]:
        """What follows the last record, and after how many epochs."""
        policy, epochs = self.entry.get("when_exhausted", "repeat"), self.entry.get("epochs")
        if policy not in get_args(WhenExhausted):
            valid = ", ".join(get_args(WhenExhausted))
            raise ValueError(f"{self.where}.when_exhausted: expected one of {valid}, found {policy!r}")
        if epochs is None:
            return policy, None if policy == "repeat" else 1
        if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
            raise ValueError(f"{self.where}.epochs: expected a whole number from 1, found {epochs!r}")
        if policy == "repeat":
            raise ValueError(
                f"{self.where}.epochs: a group that repeats has no last epoch; add when_exhausted: drop or stop, or leave it out"
            )
        return policy, epochs

    def _source(self, name: str, start: int, end: int | None, shuffle_seed: int | None) -> SourceSpec:
        if name in self.own_locations:
            where, location = f"{self.file}: dataset_info.{self.kind}.{name}", self.own_locations[name]
            base = self.file.resolve().parent
        elif name in self.locations:
            where, location = f"DATASET_INFO[{self.kind!r}][{name!r}]", self.locations[name]
            base = Path.cwd()
            _require_location(location, where)
        else:
            raise self._unknown_dataset(name)
        source_format = self.dataset_class.source_format
        keys = FORMATS[source_format].keys
        path_key = next((key for key in keys if key in location), None)
        if path_key is None:
            raise ValueError(f"{where}: the key {keys[0]!r} is missing, {self.kind} reads it")
        return SourceSpec(
            dataset=name,
            location=_absolute(location, base),
            format=source_format,
            path_key=path_key,
            start=start,
            end=end,
            shuffle_seed=shuffle_seed,
        )

    def _unknown_dataset(self, name: str) -> ValueError:
        known = [*self.own_locations, *self.locations]
        return ValueError(
            f"{self.where}.dataset_names: nothing says where {name!r} is{_nearest(name, known)}; "
            f"add dataset_info.{self.kind}.{name} to the YAML"
        )


def used_ranges(
    used: Any, names: Sequence[str], where: str, *, unit: str = "records", as_published: bool = False
) -> list[tuple[int, int | None]]:
    """`num_used_data` as one `(start, end)` per name; end None = all.

    Args:
        used: the YAML's value.
        names: of the data sets.
        where: names the key in messages.
        unit: what is counted, for the log.
        as_published: a list is counts whatever its length: names beyond it have no range, numbers beyond the names do not matter.

    Raises:
        ValueError: if it is none of the published forms.
    """
    if used is None or used == 0:
        return [(0, None)] * len(names)
    if isinstance(used, dict):
        for given in used:
            if given not in names:
                raise ValueError(f"{where}: no such data set {given!r}{_nearest(given, names)}")
        logger.info("%s: %s is read as the %s of each data set, [start, end] or how many", where, used, unit)
        return [_range(used.get(n, 0), f"{where}.{n}") for n in names]
    if isinstance(used, list) and len(used) == 2 and len(names) == 1 and not as_published:
        logger.info("%s: %s of one data set is read as a range of %s, start and end", where, used, unit)
        return [_range(used, where)]
    counts = [used] * len(names) if isinstance(used, int) else used
    if not isinstance(counts, list) or (len(counts) != len(names) and not as_published):
        raise ValueError(
            f"{where}: {used!r} fits none of: a number; one per name ({len(names)}); {{name: [start, end]}}"
        )
    logger.info("%s: %s is read as how many %s of each data set, 0 = all", where, used, unit)
    return [_range(count, where) for count in counts[: len(names)]]


def _range(value: Any, where: str) -> tuple[int, int | None]:
    start, end = value if isinstance(value, list) and len(value) == 2 else (0, value)
    if not all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in (start, end)):
        raise ValueError(f"{where}: expected a count or [start, end], found {value!r}")
    if (start, end) != (0, 0) and end <= start:
        raise ValueError(f"{where}: the range {value!r} is empty; [0, 0] means all")
    return start, end or None


# ------------------------------------------------------------------------------------------- locations, files


def _require_locations(own_info: Any, where: str, registry: Iterable[str]) -> None:
    if not isinstance(own_info, dict):
        raise ValueError(f"{where}: expected dataset class -> name -> location")
    for kind, named in own_info.items():
        if kind not in registry:
            raise ValueError(f"{where}: no dataset class {kind!r}{_nearest(kind, registry)}")
        if not isinstance(named, dict):
            raise ValueError(f"{where}.{kind}: expected name -> location, found {named!r}")
        for name, location in named.items():
            _require_location(location, f"{where}.{kind}.{name}")


def _require_location(location: Any, where: str) -> None:
    valid = [*LOCATION_KEYS, *NOTE_KEYS]
    if not isinstance(location, dict):
        raise ValueError(f"{where}: expected keys such as 'jsonl_path', found {location!r}")
    for key in location:
        if key not in valid:
            raise ValueError(f"{where}: unknown key {key!r}{_nearest(key, valid)}")


def _absolute(location: Mapping[str, Any], base: Path) -> dict[str, str]:
    return {
        key: str(at) if is_remote(str(at)) else os.path.normpath(base / str(at))
        for key, at in location.items()
        if key not in NOTE_KEYS
    }


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys and says nothing: a group of the mixture would vanish."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                continue  # refused by PyYAML itself
            if key in seen and key != "<<":
                at = f"line {key_node.start_mark.line + 1}"
                raise ValueError(
                    f"{at}: the key {key!r} is there twice; two groups of one class need names and 'type:'"
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except OSError as e:
        raise ValueError(f"{file}: cannot be read ({e.strerror}); check --dataset_config_file") from e
    except (yaml.YAMLError, ValueError) as e:
        raise ValueError(f"{file}: not valid YAML: {' '.join(str(e).split())}") from e
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file}: expected groups at the top level, such as 'vlm_sft:'")
    try:
        return {str(key): _substitute(value, f"{file}: {key}") for key, value in content.items()}
    except RecursionError:
        raise ValueError(f"{file}: nested too deep; an anchor must not contain itself") from None


def _substitute(value: Any, where: str) -> Any:
    """A copy in which `${NAME}` and `${NAME:default}` of all strings are replaced."""
    if isinstance(value, dict):
        return {key: _substitute(v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(value, list):
        return [_substitute(v, where) for v in value]
    if not isinstance(value, str):
        return value

    def variable(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise ValueError(
                f"{where}: the environment variable {name} is not set; export it or write ${{{name}:default}}"
            )
        return found

    return re.sub(r"\$\{(\w+)(?::([^}]*))?\}", variable, value)


def _nearest(given: Any, valid: Iterable[str]) -> str:
    names = sorted(valid)
    near = get_close_matches(str(given), names, n=1, cutoff=0.0)
    return f"; did you mean {near[0]!r}?" if near else ""
