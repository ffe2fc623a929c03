"""A trained, sharded model -> a model directory in the published layout, which inference and other runs read."""

import functools
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from modeling.weights import WEIGHTS
from train.distributed.collectives import on_main
from train.distributed.sharding import full_tensors
from train.state import TrainState


def export_model(state: TrainState, source: Path, target: Path) -> None:
    """Write averaged and last weights beside the files of `source`; every rank must call.

    Args:
        state: what was trained.
        source: the run's `--model_path`; its configurations, tokenizer and autoencoder are copied.
        target: new model directory; files there are replaced.

    Raises:
        ValueError: on every rank, if it cannot be written.
    """
    on_main(lambda: _copy_rest(source, target))
    weights = {"ema": state.ema.with_frozen(state.model), "model": dict(state.model.named_parameters())}
    for kind, tensors in weights.items():
        whole = full_tensors(tensors.items())
        on_main(functools.partial(_save, whole, target / WEIGHTS[kind]))


def _copy_rest(source: Path, target: Path) -> None:
    try:
        target.mkdir(parents=True, exist_ok=True)
        for file in sorted(source.iterdir()):
            if (
                file.is_file()
                and file.name not in WEIGHTS.values()
                and file.resolve() != (target / file.name).resolve()
            ):
                shutil.copyfile(file, target / file.name)
    except OSError as e:
        raise ValueError(f"{target}: the trained model cannot be written ({e})") from e


def _save(tensors: dict[str, Tensor], file: Path) -> None:
    # Written aside and renamed, so that a reader never meets half a file.
    draft = file.with_suffix(".tmp")
    try:
        save_file(tensors, draft)
        draft.replace(file)
    except OSError as e:
        raise ValueError(f"{file}: the trained model cannot be written ({e})") from e
