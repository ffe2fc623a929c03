"""A model directory -> a model on the meta device and the values of its parameters.

The trainer shards the empty model first and then asks for one value after the other; inference fills it at once.
"""

import difflib
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.init import fixed_tables, initial_value
from modeling.weights import TOWER, WEIGHTS, Weights, find_weights, open_weights

logger = logging.getLogger(__name__)


def build_model(model_dir: str | Path) -> Bagel:
    """The model a directory describes, on the meta device: shapes without memory."""
    config = BagelConfig.from_model_dir(model_dir)
    with torch.device("meta"):
        return Bagel(config)


def initial_values(config: BagelConfig, seed: int) -> Callable[[str, torch.Size], Tensor]:
    """Random starting values by name and shape, for training from nothing."""
    return lambda name, shape: initial_value(name, shape, config, seed)


def weights_kind(model_dir: str | Path, *, prefer_ema: bool) -> str:
    """`ema` or `model`: the preferred one if the directory has it, else the one it has."""
    kinds = ("ema", "model") if prefer_ema else ("model", "ema")
    return next((kind for kind in kinds if find_weights(model_dir, kind)), kinds[0])


def stored_values(model_dir: str | Path, model: Bagel, weights: str) -> Callable[[str, torch.Size], Tensor]:
    """Values of a checkpoint in the published layout, read one tensor at a time.

    Args:
        model_dir: holds the weights (see `modeling.weights`).
        model: what the values are for; position tables are computed, not read.
        weights: `ema` or `model`.

    Raises:
        ValueError: if the weights are missing or damaged, lack a parameter, or hold one of another shape.
    """
    file = find_weights(model_dir, weights)
    if file is None:
        raise ValueError(
            f"{Path(model_dir) / WEIGHTS[weights]}: no weights here; train or export a model first, or ask for "
            "--from_scratch True"
        )
    store, tables = open_weights(file), fixed_tables(model.config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tables}
    _require_complete(store, shapes)
    return lambda name, shape: tables[name] if name in tables else store.read(name)


def _require_complete(store: Weights, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Say by component what is found, and stop if anything is missing."""
    missing = sorted(wanted.keys() - store.shapes.keys())
    unexpected = sorted(store.shapes.keys() - wanted.keys())
    wrong = sorted(k for k in wanted.keys() & store.shapes.keys() if wanted[k] != store.shapes[k])
    total, absent, extra = (
        Counter(map(_component, keys)) for keys in (wanted, [*missing, *wrong], unexpected)
    )
    for part in sorted({*total, *extra}):
        logger.info("%s: %s: %d of %d tensors loaded, %d in the file not used", store.name.name, part,
                    total[part] - absent[part], total[part], extra[part])  # fmt: skip
    if not missing and not wrong:
        return
    lines = [f"lacks {k}{_nearest(k, unexpected)}" for k in missing[:5]]
    lines += [f"{k} is {list(store.shapes[k])}, the configuration says {list(wanted[k])}" for k in wrong[:5]]
    raise ValueError(
        f"{store.name}: {len(missing)} tensors missing, {len(wrong)} of another shape: {'; '.join(lines)}"
    )


def _component(key: str) -> str:
    """`heads.box.key.weight` -> `heads.box`; `vit_model.…` -> `vit_model`."""
    parts = key.split(".")
    return ".".join(parts[:2]) if parts[0] == "heads" else parts[0]


def _nearest(key: str, unexpected: Sequence[str]) -> str:
    """A key of the file that nothing asked for and that may be the one, misnamed."""
    close = difflib.get_close_matches(key, unexpected, n=1, cutoff=0.9)
    return f" (it has {close[0]}, which nothing uses)" if close else ""


def with_tower(
    values: Callable[[str, torch.Size], Tensor], vit_path: str | Path, model: Bagel
) -> Callable[[str, torch.Size], Tensor]:
    """The same values, but the vision tower's from `vit_path/vit_model.safetensors` (keys without the `vit_model.` prefix).

    Raises:
        ValueError: if the file is missing or damaged, or is of another tower.
    """
    file, prefix = Path(vit_path) / TOWER, "vit_model."
    wanted = {
        n.removeprefix(prefix): tuple(p.shape) for n, p in model.named_parameters() if n.startswith(prefix)
    }
    try:
        store = open_weights(file)
    except ValueError as e:
        raise ValueError(f"--vit_path {e}") from e
    if wrong := sorted(
        key for key in wanted.keys() | store.shapes.keys() if wanted.get(key) != store.shapes.get(key)
    ):
        raise ValueError(
            f"--vit_path {file}: {len(wrong)} tensors are missing, unexpected or of another shape than vit_config.json says, "
            f"first {wrong[0]}"
        )
    logger.info("%s: the vision tower's %d tensors loaded", file, len(wanted))

    def value(name: str, shape: torch.Size) -> Tensor:
        return store.read(name.removeprefix(prefix)) if name.startswith(prefix) else values(name, shape)

    return value


def load_model(model_dir: str | Path, weights: str = "ema", device: str | torch.device = "cpu") -> Bagel:
    """The trained model of a directory, ready for inference (float32, eval mode)."""
    model = build_model(model_dir)
    value = stored_values(model_dir, model, weights)
    model.to_empty(device=device)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(value(name, p.shape))
    return model.eval().requires_grad_(False)
