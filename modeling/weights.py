"""The weights of a model directory: which files, under which keys, read one tensor at a time.

Read: `ema.safetensors` or `model.safetensors`, their `_bf16` copies where the originals are absent, or several files with an
`*.safetensors.index.json`. Keys may carry the prefixes of wrappers (`module.`, `bagel.`). What is computed and not read (position
tables, rotary tables), and what belongs to another model (a VAE kept beside), is left out here.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = {"ema": "ema.safetensors", "model": "model.safetensors"}
"""Kind of weights -> the file that export writes and that is looked for first."""
TOWER = "vit_model.safetensors"
PREFIXES = ("module.", "bagel.")
NOT_READ = re.compile(r"^(vae_model\.|latent_pos_embed\.|vit_pos_embed\.)|\.rope\.(cos|sin)_[hw]$")
VIT_LAYER = re.compile(r"^vit_model\.vision_model\.encoder\.layers\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by key; nothing is read before `read`.

    Attributes:
        name: of the file or index, for messages.
        shapes: key -> shape.
        table_sides: key -> side of the square position table that is stored under it.
    """

    name: Path
    shapes: Mapping[str, tuple[int, ...]]
    table_sides: Mapping[str, int]
    _read: Callable[[str], Tensor]

    def read(self, key: str) -> Tensor:
        """One tensor, in the precision of the file."""
        return self._read(key)

    @property
    def vit_depth(self) -> int:
        """Layers of the vision tower that are there."""
        layers = [int(found[1]) for key in self.shapes if (found := VIT_LAYER.match(key))]
        return max(layers, default=-1) + 1


def find_weights(model_dir: str | Path, kind: str) -> Path | None:
    """The file or index that holds the weights of a kind, None if there is none; the most exact one first."""
    root, stem = Path(model_dir), WEIGHTS[kind].removesuffix(".safetensors")
    names = (
        f"{stem}.safetensors",
        f"{stem}.safetensors.index.json",
        f"{stem}_bf16.safetensors",
        f"{stem}_bf16.safetensors.index.json",
    )
    return next((root / name for name in names if (root / name).is_file()), None)


def open_weights(file: Path) -> Weights:
    """Open a safetensors file, or all that an index names.

    Raises:
        ValueError: naming the file that is missing or damaged.
    """
    stores = {shard: _open(shard) for shard in _shards(file)}
    places: dict[str, tuple[Path, str]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    sides: dict[str, int] = {}
    for shard, store in stores.items():
        for stored in store.keys():  # noqa: SIM118 - not a dict
            key = _plain(stored)
            if key.endswith("pos_embed.pos_embed"):
                sides[key] = math.isqrt(store.get_slice(stored).get_shape()[0])
            if NOT_READ.search(key):
                continue
            if key in places:
                raise ValueError(f"{shard}: holds {key} once more; it is in {places[key][0].name} too")
            places[key] = (shard, stored)
            shapes[key] = tuple(store.get_slice(stored).get_shape())
    return Weights(file, shapes, sides, lambda key: stores[places[key][0]].get_tensor(places[key][1]))


def _shards(file: Path) -> list[Path]:
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
        raise ValueError(f"{file}: cannot be read as safetensors ({e})") from e


def _plain(key: str) -> str:
    while prefix := next((p for p in PREFIXES if key.startswith(p)), ""):
        key = key.removeprefix(prefix)
    return key
