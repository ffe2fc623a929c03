"""A model directory -> a model on the meta device and the values of its parameters.

The trainer shards the empty model first and then asks for one value after the other; inference fills it at once.
"""

import logging
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.init import fixed_tables, initial_value

logger = logging.getLogger(__name__)

TOWER = "vit_model.safetensors"
WEIGHTS = {"ema": "ema.safetensors", "model": "model.safetensors"}


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
    return next((kind for kind in kinds if (Path(model_dir) / WEIGHTS[kind]).is_file()), kinds[0])


def stored_values(model_dir: str | Path, model: Bagel, weights: str) -> Callable[[str, torch.Size], Tensor]:
    """Values of a checkpoint in the published layout, read one tensor at a time.

    Args:
        model_dir: holds `ema.safetensors` and/or `model.safetensors`.
        model: what the values are for; position tables are computed, not read.
        weights: `ema` or `model`.

    Raises:
        ValueError: if the file is missing or damaged, or lacks a parameter, or holds one of another shape.
    """
    file = Path(model_dir) / WEIGHTS[weights]
    if not file.is_file():
        raise ValueError(
            f"{file}: no weights here; train or export a model first, or ask for --from_scratch True"
        )
    tables = fixed_tables(model.config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters() if name not in tables}
    try:
        store = safe_open(file, framework="pt")
        held = {key: tuple(store.get_slice(key).get_shape()) for key in store.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{file}: cannot be read as safetensors ({e})") from e
    missing = sorted(shapes.keys() - held.keys())
    unexpected = sorted(held.keys() - shapes.keys() - tables.keys())
    wrong = sorted(k for k in shapes.keys() & held.keys() if shapes[k] != held[k])
    logger.info(
        "%s: %d of %d tensors loaded, %d not used",
        file,
        len(shapes) - len(missing),
        len(shapes),
        len(unexpected),
    )
    if missing or wrong:
        lines = [f"lacks {k}" for k in missing[:5]]
        lines += [f"{k} is {list(held[k])}, the configuration says {list(shapes[k])}" for k in wrong[:5]]
        raise ValueError(
            f"{file}: {len(missing)} tensors missing, {len(wrong)} of another shape: {'; '.join(lines)}"
        )
    return lambda name, shape: tables[name] if name in tables else store.get_tensor(name)


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
        store = safe_open(file, framework="pt")
        held = {key: tuple(store.get_slice(key).get_shape()) for key in store.keys()}  # noqa: SIM118 - not a dict
    except (OSError, SafetensorError) as e:
        raise ValueError(f"--vit_path {file}: cannot be read as safetensors ({e})") from e
    if wrong := sorted(key for key in wanted.keys() | held.keys() if wanted.get(key) != held.get(key)):
        raise ValueError(
            f"--vit_path {file}: {len(wrong)} tensors are missing, unexpected or of another shape than vit_config.json says, "
            f"first {wrong[0]}"
        )
    logger.info("%s: the vision tower's %d tensors loaded", file, len(wanted))

    def value(name: str, shape: torch.Size) -> Tensor:
        return store.get_tensor(name.removeprefix(prefix)) if name.startswith(prefix) else values(name, shape)

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
