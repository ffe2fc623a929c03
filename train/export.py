"""A trained model -> a model directory in the published layout, which inference, other runs and the published programs read.

Used by the trainer at its end and by `scripts/convert/export.py`. The directory is written aside and renamed when complete;
weights pass through memory one tensor at a time. `vit_config.json` follows the published rule (`modeling/source.py`): it counts
one layer of the tower more than there is, and `bagel_config.json` says so. The same model gives the same bytes.
"""

import functools
import json
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from data.tokenizer_files import NAMES as TOKENIZER_NAMES
from data.tokenizer_files import derived_files
from modeling.autoencoder import (
    CONFIG_NAME,
    WEIGHTS_NAMES,
    AutoEncoderConfig,
    find_autoencoder,
    load_autoencoder,
    read_config,
    save_autoencoder,
)
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.build import build_model
from modeling.siglip.config import SiglipConfig
from modeling.source import ModelSource
from modeling.tensor_file import Entry, FilePlan, Written, plan_files, write_files
from train.distributed.collectives import on_main, rank, world_size
from train.distributed.sharding import full_tensor
from train.files import describe_file, put_in_place, sync_directory
from train.state import TrainState

FORMAT = "weft-model/1"
MANIFEST = "manifest.json"
PUBLISHED_SELECT_LAYER = -2
ROOT = Path(__file__).resolve().parents[1]

Read = Callable[[str, str], Tensor]
"""(kind of weights, name) -> the whole tensor; every rank calls it, with the same names in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDirectory:
    """A model directory to be written.

    Attributes:
        target: where; an export that stands there is replaced.
        source: the model, and where its files other than weights are.
        origin: what the manifest says of where the weights come from.
        plans: kind of weights (`ema`, `model`) -> files.
    """

    target: Path
    source: ModelSource
    origin: Mapping[str, Any]
    plans: Mapping[str, Sequence[FilePlan]]

    @property
    def place(self) -> Path:
        """The directory itself: a link to it stays a link."""
        return self.target.resolve()

    @property
    def draft(self) -> Path:
        return self.place.with_name(f"{self.place.name}.weft_draft")


def export_model(state: TrainState, source: ModelSource, target: Path, run: str) -> None:
    """Write averaged and last weights of a run at its end; every rank must call.

    Args:
        state: what was trained.
        source: what the run was built from.
        target: see `require_replaceable`.
        run: the run's name in the manifest.

    Raises:
        ValueError: on every rank, if it cannot be written; what stood there before stays.
    """
    named = dict(state.model.named_parameters())
    tensors = {"ema": state.ema.with_frozen(state.model), "model": named}
    entries = float32_entries(source.config)
    alias = tied_names(build_model(source.config))
    write_model_directory(
        ModelDirectory(
            target=target,
            source=source,
            origin={"run": run, "step": state.step},
            plans={kind: plan_files(kind, entries) for kind in tensors},
        ),
        lambda kind, name: full_tensor(tensors[kind][alias.get(name, name)]),
    )


def float32_entries(config: BagelConfig) -> dict[str, Entry]:
    """Every tensor of a model, position tables and tied copies too, as training keeps it."""
    state = build_model(config).state_dict()
    return {name: Entry(shape=tuple(x.shape), dtype=torch.float32) for name, x in state.items()}


def tied_names(model: Bagel) -> dict[str, str]:
    """Name of a tied copy -> the name under which training keeps the tensor."""
    first: dict[int, str] = {}
    every = model.named_parameters(remove_duplicate=False)
    names = {name: first.setdefault(id(p), name) for name, p in every}
    return {name: kept for name, kept in names.items() if name != kept}


def write_model_directory(job: ModelDirectory, read: Read) -> None:
    """Write everything aside, then put it in place; every rank must call.

    Raises:
        ValueError: on every rank, if it cannot be written; what stood there before stays.
    """
    on_main(lambda: _begin(job))
    written: dict[str, Written] = {}
    for kind, plan in job.plans.items():
        written.update(_write_weights(job, plan, functools.partial(read, kind)))
    on_main(lambda: _complete(job, written))


def _write_weights(
    job: ModelDirectory, plan: Sequence[FilePlan], read: Callable[[str], Tensor]
) -> dict[str, Written]:
    """One kind of weights; every rank must call. What was written is known to rank 0."""
    tensors = ((name, _at_once(read(name))) for part in plan for name in part.entries)
    written: dict[str, Written] = {}
    failure: OSError | None = None
    if rank() == 0:
        try:
            written = write_files(job.draft, plan, tensors)
        except OSError as error:
            failure = error
    if world_size() > 1:
        for (
            _
        ) in tensors:  # reading is collective: a rank that does not write, or cannot, takes part all the same
            pass
    on_main(lambda: _require_no_failure(job, failure))
    return written


def _at_once(x: Tensor) -> Tensor:
    """Wait until a tensor is there.

    NCCL only queues a gather: the ranks that do not write would queue many of them while rank 0 writes, and `--dist_timeout_s`
    counts from when a gather is queued.
    """
    if x.device.type == "cuda":
        torch.cuda.synchronize(x.device)
    return x


def require_replaceable(target: Path) -> None:
    """Check that an export may be written to a place: there is nothing, an empty directory, or an export and nothing else.

    Raises:
        ValueError: naming what would be lost.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise ValueError(f"{target}: is a file; an export is a directory: choose another place")
    found = {str(file.relative_to(target)) for file in target.rglob("*")}
    manifest = _read_manifest(target)
    own = {MANIFEST, *manifest["files"]} if manifest else set()
    if foreign := sorted(found - own):
        raise ValueError(
            f"{target}: holds {foreign[0]}, which no export has written; move it away, or choose another place"
        )


def read_origin(model_dir: Path) -> Mapping[str, Any]:
    """Where the weights of a model directory come from: what its manifest says, so that an export of an export names the run."""
    manifest = _read_manifest(model_dir)
    return manifest["source"] if manifest else {"model_directory": model_dir.name}


def code_version() -> dict[str, str]:
    """The project's version and, in a checkout, its commit (`-dirty`: with changes)."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {"version": version}
    return {"version": version, "commit": done.stdout.strip()}


def _begin(job: ModelDirectory) -> None:
    """Check everything that can be known beforehand, and write the small files."""
    require_replaceable(job.place)
    try:
        shutil.rmtree(job.draft, ignore_errors=True)  # of an export that was killed
        job.draft.mkdir(parents=True)
    except OSError as error:
        raise _cannot(job, error) from error
    try:
        _require_room(job)
        _write_rest(job)
    except OSError as error:
        shutil.rmtree(job.draft, ignore_errors=True)
        raise _cannot(job, error) from error
    except ValueError:
        shutil.rmtree(job.draft, ignore_errors=True)
        raise


def _require_room(job: ModelDirectory) -> None:
    needed = sum(part.num_bytes for plan in job.plans.values() for part in plan)
    needed += find_autoencoder(job.source.vae_path).stat().st_size
    free = shutil.disk_usage(job.draft).free
    if needed > free:
        raise ValueError(
            f"{job.target}: the export needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free there; make room or "
            "choose another place"
        )


def _require_no_failure(job: ModelDirectory, failure: OSError | None) -> None:
    if failure is not None:
        shutil.rmtree(job.draft, ignore_errors=True)
        raise _cannot(job, failure)


def _cannot(job: ModelDirectory, error: OSError) -> ValueError:
    reason = error.strerror or error
    return ValueError(
        f"{job.target}: the model cannot be written ({reason}); make room or choose another place"
    )


def _write_rest(job: ModelDirectory) -> None:
    """Everything but the weights."""
    source, folder = job.source, job.draft
    llm = {**source.llm_json, **asdict(source.config.llm)}
    vit = {**source.vit_json, **asdict(source.config.vit)}
    vit["num_hidden_layers"] = source.config.vit.num_hidden_layers - 1 - PUBLISHED_SELECT_LAYER
    left_out = {"llm", "vit", "latent_channels", "vae_downsample"}  # files of their own
    bagel = {f.name: getattr(source.config, f.name) for f in fields(BagelConfig) if f.name not in left_out}
    bagel["vit_select_layer"] = PUBLISHED_SELECT_LAYER
    _write(folder / "llm_config.json", llm)
    _write(folder / "vit_config.json", vit)
    _write(folder / "bagel_config.json", bagel)
    if not _copy(source.model_path / "config.json", folder, wanted=source.llm_path is None):
        plain = {key: bagel[key] for key in bagel if key not in ("heads", "head_reads")}
        _write(folder / "config.json", {"model_type": "bagel", **plain, "llm_config": llm, "vit_config": vit})
    _copy(source.tokenizer_path / "generation_config.json", folder)
    _copy(source.model_path / "preprocessor_config.json", folder)
    for name in TOKENIZER_NAMES:
        _copy(source.tokenizer_path / name, folder)
    for name, text in derived_files(source.tokenizer_path / "tokenizer.json").items():
        if not (folder / name).exists():
            (folder / name).write_text(text, encoding="utf-8")
    _write_autoencoder(source.vae_path, folder)


def _write_autoencoder(path: Path, folder: Path) -> None:
    """`ae.safetensors` under the published names, and its size where that is not the published one."""
    file, config = find_autoencoder(path), read_config(path)
    with safe_open(file, framework="pt") as store:
        plain = not any(key.startswith(("module.", "encoder.down_blocks.")) for key in store.keys())  # noqa: SIM118 - not a dict
    if not plain:
        save_autoencoder(load_autoencoder(path), folder)
    else:
        shutil.copyfile(file, folder / WEIGHTS_NAMES[0])
    if config != AutoEncoderConfig():
        _write(folder / CONFIG_NAME, config.to_json())
    else:
        (folder / CONFIG_NAME).unlink(missing_ok=True)


def _complete(job: ModelDirectory, written: Mapping[str, Written]) -> None:
    known = {name: {"bytes": w.num_bytes, "sha256": w.sha256} for name, w in written.items()}
    names = sorted(file.name for file in job.draft.iterdir())
    manifest = {
        "format": FORMAT,
        "source": dict(job.origin),
        "code": code_version(),
        "tensors": {kind: sum(len(part.entries) for part in plan) for kind, plan in job.plans.items()},
        "beyond_published": beyond_published(job.source.config),
        "files": {name: known.get(name) or describe_file(job.draft / name) for name in names},
    }
    try:
        _write(job.draft / MANIFEST, manifest)
        sync_directory(job.draft)
        put_in_place(job.draft, job.place)
    except OSError as error:
        shutil.rmtree(job.draft, ignore_errors=True)
        raise _cannot(job, error) from error


def beyond_published(config: BagelConfig) -> list[str]:
    """What of a model the published programs do not have: with them it would run without it, or not at all."""
    notes = {
        "heads": bool(config.heads),
        "no visual_gen": not config.visual_gen,
        "no visual_und": not config.visual_und,
        "stem_width": bool(config.vit.stem_width),
        "vit_rope": config.vit.rope,
        "another vision tower": not isinstance(config.vit, SiglipConfig),
        "no qk_norm": not config.llm.qk_norm,
        f"layer_module {config.llm.layer_module}": config.llm.layer_module != "Qwen2MoTDecoderLayer",
        "a VAE of another size": (config.latent_channels, config.vae_downsample) != (16, 8),
    }
    return [note for note, is_so in notes.items() if is_so]


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return manifest if manifest["format"] == FORMAT and {*manifest["files"]} else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _copy(file: Path, folder: Path, *, wanted: bool = True) -> bool:
    if not wanted or not file.is_file():
        return False
    shutil.copyfile(file, folder / file.name)
    return True


def _write(file: Path, values: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
