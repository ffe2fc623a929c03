"""The weights of a model directory: which files, under which keys, read one tensor at a time.

Read: `ema.safetensors` or `model.safetensors`, their `_bf16` copies where the originals are absent, or several files with an
`*.safetensors.index.json`. Keys may carry the prefixes of wrappers (`module.`, `bagel.`). What is computed and not read (position
tables, rotary tables), and what belongs to another model (a VAE kept beside, or named in the index), is left out here. The files
are mapped, not copied: a node holds one copy of the pages in use, a process one tensor. `modeling/tensor_file.py` writes what is
read here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = {"ema": "ema.safetensors", "model": "model.safetensors"}
"""Kind of weights -> the file that export writes and that is looked for first."""
PREFIXES = ("module.", "bagel.")
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Precision as a safetensors header spells it -> torch's; what has another is no weight."""
ROTARY = re.compile(r"\.rope\.(cos|sin)_[hw]$")
AUTOENCODER = r"vae_model\.|(encoder|decoder)\.(conv_in|down|mid|up|norm_out|conv_out)\."
NOT_READ = re.compile(rf"^({AUTOENCODER}|latent_pos_embed\.|vit_pos_embed\.)|{ROTARY.pattern}")
LFS_POINTER = b"version https://git-lfs"
LLM_LAYER = re.compile(r"^language_model\.model\.layers\.(\d+)\.")
VIT_LAYER = re.compile(r"^vit_model\.vision_model\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """Tensors by key; nothing is read before `read`.

    Attributes:
        name: of the file or index, for messages.
        shapes: key -> shape of what a model takes from here.
        dtypes: key -> precision, of the tables too; counters and the like have none.
        tables: key -> shape of the stored position tables. They can be read and need not be.
        rotary: whether the vision tower's rotary tables are stored.
    """

    name: Path
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype]
    tables: Mapping[str, tuple[int, ...]]
    _read: Callable[[str], Tensor]
    rotary: bool = False

    def read(self, key: str) -> Tensor:
        """One tensor, in the precision of the file."""
        return self._read(key)

    @property
    def table_sides(self) -> dict[str, int]:
        """Key of a square position table -> positions per side."""
        return {key: math.isqrt(shape[0]) for key, shape in self.tables.items()}

    @property
    def llm_depth(self) -> int:
        """Layers of the language model that are there."""
        return self._depth(LLM_LAYER)

    @property
    def vit_depth(self) -> int:
        """Layers of the vision tower that are there."""
        return self._depth(VIT_LAYER)

    def _depth(self, layer: re.Pattern[str]) -> int:
        return max((int(found[1]) for key in self.shapes if (found := layer.match(key))), default=-1) + 1

    def renamed(
        self, keys: Mapping[str, str], change: Callable[[str, Tensor], Tensor] | None = None
    ) -> "Weights":
        """The same tensors under other names.

        Args:
            keys: new key -> key here; one tensor may have several new keys, and what has none keeps its own.
            change: (new key, tensor) -> tensor, a cheap rearrangement such as a flattening.
        """
        taken = set(keys.values())
        names = {**keys, **{key: key for key in self.shapes if key not in taken}}

        def read(key: str) -> Tensor:
            tensor = self.read(names[key])
            return tensor if change is None else change(key, tensor)

        def shape(new: str, old: str) -> tuple[int, ...]:
            if change is None or old not in taken:
                return self.shapes[old]
            return tuple(change(new, torch.empty(self.shapes[old], device="meta")).shape)

        return Weights(
            name=self.name,
            shapes={new: shape(new, old) for new, old in names.items()},
            dtypes={new: self.dtypes[old] for new, old in names.items() if old in self.dtypes},
            tables=self.tables,
            rotary=self.rotary,
            _read=read,
        )


def find_weights(model_dir: str | Path, kind: str) -> Path | None:
    """The file or index that holds the weights of a kind, None if there is none; the most exact one first."""
    root, stem = Path(model_dir), WEIGHTS[kind].removesuffix(".safetensors")
    names = (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}_bf16.safetensors",
        f"{stem}_bf16.safetensors.index.json",
    )
    files = (root / name for name in names if (root / name).is_file())
    return next((file for file in files if file.suffix != ".json" or _names_tensors(file)), None)


def open_weights(file: Path) -> Weights:
    """Open a safetensors file, or all that an index names.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    stores = {shard: _open(shard) for shard in weight_files(file)}
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, torch.dtype] = {}
    tables: dict[str, tuple[int, ...]] = {}
    rotary = False
    for shard, store in stores.items():
        for stored in store.keys():  # noqa: SIM118 - not a dict
            key, part = _plain(stored), store.get_slice(stored)
            rotary |= ROTARY.search(key) is not None
            is_table = key.endswith("pos_embed.pos_embed")
            if NOT_READ.search(key) and not is_table:
                continue
            if key in places:
                raise ValueError(f"{shard}: holds {key} once more; it is in {places[key][0].name} too")
            places[key] = (shard, stored)
            if part.get_dtype() in DTYPES:
                dtypes[key] = DTYPES[part.get_dtype()]
            (tables if is_table else shapes)[key] = tuple(part.get_shape())
    return Weights(
        name=file,
        shapes=shapes,
        dtypes=dtypes,
        tables=tables,
        rotary=rotary,
        _read=lambda key: stores[places[key][0]].get_tensor(places[key][1]),
    )


def _names_tensors(index: Path) -> bool:
    """Whether an index maps tensors to files. Some published trainers write a map of components under the same name."""
    try:
        return any(key.endswith((".weight", ".bias")) for key in json.loads(index.read_text())["weight_map"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        return True  # whatever it is, `open_weights` says what is wrong with it


def weight_files(file: Path) -> list[Path]:
    """The files that hold tensors: a safetensors file itself, or all that an index names."""
    if file.suffix != ".json":
        return [file]
    try:
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
    except (OSError, json.JSONDecodeError, KeyError, AttributeError, TypeError) as e:
        raise ValueError(f"{file}: is no index of safetensors files ({e})") from e
    if missing := [name for name in names if not (file.parent / name).is_file()]:
        raise ValueError(
            f"{file}: names {missing[0]}, which is not there; {len(missing)} of {len(names)} files are missing"
        )
    return [file.parent / name for name in names]


def _open(file: Path):
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as e:
        raise unreadable(file, e) from e


def unreadable(file: Path, error: Exception) -> ValueError:
    """What is wrong with a file that safetensors refuses, for people."""
    with suppress(OSError), file.open("rb") as f:
        if f.read(len(LFS_POINTER)) == LFS_POINTER:
            return ValueError(
                f"{file}: is a git-lfs pointer that stands for the weights; run `git lfs pull` in {file.parent} to get them"
            )
    return ValueError(f"{file}: cannot be read as safetensors ({error}); copy it here again")


def _plain(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key
