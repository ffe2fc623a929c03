"""What a run makes of a model: other weights (`Tuning`), or adapters beside weights that stay (`AdapterTuning`, --lora_enable).

`train/main.py` calls the methods in their order here and asks nowhere which of the two it has.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from modeling.adapters import (
    ADAPTER,
    RECORD,
    Adapter,
    LoraSpec,
    adapted_values,
    add_adapters,
    find_adapter,
    fingerprints,
    open_adapter,
    peft,
    target_pattern,
    whole_modules,
    write_adapter,
)
from modeling.bagel.bagel import Bagel
from modeling.build import Values, parameter_shapes, weights_kind
from modeling.quantised import Precision, bitsandbytes, fill_quantised, quantise, take_matrices_out
from modeling.source import ModelSource
from train.args import Args
from train.checkpoint import ARGS, Start
from train.distributed.collectives import on_main, rank
from train.distributed.sharding import full_tensor
from train.export import code_version, export_model, require_replaceable
from train.files import put_in_place, sync_directory
from train.param_manager import group_of, require_reached
from train.state import TrainState

logger = logging.getLogger(__name__)

KINDS = ("ema", "model")
"""Of weights that a run leaves: averaged, and last."""


class Tuning:
    """Training of the model's own weights.

    Args:
        args: all flags.
        source: the model.
        start: what the run continues or begins from, if not `source`.

    Raises:
        ValueError: if flags do not go together, or `start` is of the other kind.
    """

    unstored: frozenset[str] = frozenset()
    """Parameters that are read from --model_path again and stand in no checkpoint."""

    def __init__(self, args: Args, source: ModelSource, start: Start | None):
        self.args, self.source, self.run = args, source, str(args.checkpoint.results_dir)
        if args.params.frozen_dtype not in ("fp32", args.fsdp.param_dtype):
            raise ValueError(
                f"--frozen_dtype {args.params.frozen_dtype}: nothing would be computed in it with --param_dtype "
                f"{args.fsdp.param_dtype}; take one of fp32, {args.fsdp.param_dtype}"
            )
        self._require_kind(start)

    @property
    def reads_start(self) -> bool:
        """Whether a checkpoint of ours holds everything, so that `--model_path`'s weights need not be read."""
        return True

    def require_room(self) -> None:
        """Check that what the run leaves can be put where it goes; known now, not after the last step.

        Raises:
            ValueError: naming what is in the way.
        """
        require_replaceable(self.target)

    def attach(self, model: Bagel, device_type: str) -> None:
        """Give the model, on the meta device, what else is trained, before anything is frozen."""

    def values(self, values: Values) -> Values:
        """Starting values of the model as it is now, by those of the model as `--model_path` has it."""
        return values

    def complete(self, model: Bagel, values: Values, device: torch.device) -> None:
        """Give a materialised model what sharding did not see."""

    def beside(self) -> dict[str, tuple[int, str]]:
        """For the table of `describe`: what of the model is no parameter of it now."""
        return {}

    def snapshot(self, state: TrainState) -> Callable[[Path], None]:
        """What is to stand in a checkpoint besides the state, as it is now; every rank must call.

        Returns:
            to be called on rank 0, when the checkpoint is written, with its directory.
        """
        return lambda folder: None

    def export(self, state: TrainState) -> None:
        """Write what the run has made; every rank must call.

        Raises:
            ValueError: on every rank, if it cannot be written; what stood there before stays.
        """
        export_model(state, self.source, self.target, run=self.run)

    @property
    def target(self) -> Path:
        """Where `export` writes."""
        return Path(self.run) / "model"

    def _require_kind(self, start: Start | None) -> None:
        lora = self.args.lora
        given = [
            f"--{name} {value}"
            for name, value in (
                ("load_in_4bit", lora.load_in_4bit),
                ("load_in_8bit", lora.load_in_8bit),
                ("lora_resume_path", lora.lora_resume_path),
            )
            if value
        ]
        if given:
            raise ValueError(f"{given[0]}: is for --lora_enable True, which trains beside a frozen base")
        if _holds_adapters(start):
            raise ValueError(
                f"{start.path}: holds adapters; continue it with --lora_enable True, or merge them into their base "  # type: ignore[union-attr]
                "(python -m scripts.convert.export --merge) and start from that"
            )


class AdapterTuning(Tuning):
    """Training of adapters and of the groups of --lora_modules_to_save; see `Tuning`."""

    def __init__(self, args: Args, source: ModelSource, start: Start | None):
        super().__init__(args, source, start)
        self.kind = weights_kind(source.model_path, prefer_ema=args.checkpoint.finetune_from_ema)
        self.record = {
            "base": {
                "path": str(source.model_path.resolve()),
                "weights": self.kind,
                "fingerprint": fingerprints(source.model_path, self.kind),
            }
        }
        self.begin: Adapter | None = None
        if args.lora.lora_resume_path is not None and start is None:
            self.begin = open_adapter(args.lora.lora_resume_path)
            self._require_same_base(self.begin.folder)
        if start is not None:
            self._require_same_base(start.path)
        self.precision: Precision | None = None
        self.layers: Mapping[str, tuple[int, int]] = {}

    @property
    def reads_start(self) -> bool:
        return False

    @property
    def target(self) -> Path:
        return Path(self.run) / "adapter"

    def require_room(self) -> None:
        if not self.target.exists():
            return
        found = {str(file.relative_to(self.target)) for file in self.target.rglob("*") if file.is_file()}
        foreign = sorted(found - {f"{kind}/{name}" for kind in KINDS for name in ADAPTER_FILES})
        if foreign or not self.target.is_dir():
            raise ValueError(
                f"{self.target}: holds {foreign[0] if foreign else 'no directory'}, which no run has written; move it away, or "
                "choose another --results_dir"
            )

    def attach(self, model: Bagel, device_type: str) -> None:
        args, lora = self.args, self.args.lora
        pattern = target_pattern(model, lora.lora_target, "--lora_target")
        if self.begin is not None:
            self.begin.require_fits(parameter_shapes(model))
        self.spec = LoraSpec(
            pattern=pattern,
            rank=lora.lora_r,
            alpha=lora.lora_alpha,
            dropout=lora.lora_dropout,
            rslora=lora.lora_use_rslora,
        )
        if lora.bits:
            self.precision = Precision(
                bits=lora.bits,
                pattern=target_pattern(model, lora.quant_target, "--quant_target"),
                kind=lora.bnb_4bit_quant_type,
                double=lora.bnb_4bit_use_double_quant,
                dtype=args.fsdp.param_dtype,
            )
            self.layers = quantise(model, self.precision, device_type)
        add_adapters(model, self.spec)
        take_matrices_out(model, self.layers)
        names = [n for n, _ in model.named_parameters()]
        adapted = {found["layer"]: lora.lora_r for n in names if (found := ADAPTER.match(n))}
        require_reached(args.params, [f"{layer}.weight" for layer in sorted(adapted)])
        saved = _words(args.params.lora_modules_to_save)
        self._require_not_whole(saved, adapted, "--lora_target puts an adapter beside")
        self._require_not_whole(saved, self.layers, "--quant_target keeps in few bits")
        if self.begin is not None:
            self._require_begin(self.begin, adapted)
        own = {f"{name}.weight" for name in self.layers} | {
            f"{name}.base_layer.weight" for name in self.layers
        }
        self.unstored = frozenset(n for n in names if not ADAPTER.match(n) and group_of(n) not in saved) | own

    def values(self, values: Values) -> Values:
        return adapted_values(values, self.args.train.global_seed, self.begin)

    def complete(self, model: Bagel, values: Values, device: torch.device) -> None:
        for name, shape in self.layers.items():
            assert self.precision is not None
            fill_quantised(model, name, values(f"{name}.weight", torch.Size(shape)), self.precision, device)

    def beside(self) -> dict[str, tuple[int, str]]:
        if self.precision is None:
            return {}
        count = sum(o * i for o, i in self.layers.values())
        return {"(base)": (count, f"frozen (in {self.precision.bits} bits, whole on every rank)")}

    def snapshot(self, state: TrainState) -> Callable[[Path], None]:
        sources = {"ema": state.ema.with_frozen(state.model), "model": dict(state.model.named_parameters())}
        trained = [n for n, p in state.model.named_parameters() if p.requires_grad]
        modules = whole_modules(state.model, trained)
        tensors: dict[str, dict[str, Tensor]] = {kind: {} for kind in KINDS}
        for kind in KINDS:
            for name in trained:  # every rank gathers; one keeps
                whole = full_tensor(sources[kind][name])
                if rank() == 0:
                    tensors[kind][name] = whole.detach().to("cpu", copy=True)
        precision = None if self.precision is None else self.precision.to_json()
        record = {
            **self.record,
            "precision": precision,
            "run": self.run,
            "step": state.step,
        }

        def write(folder: Path) -> None:
            version = code_version()
            for kind in KINDS:
                place = folder / "adapter" / kind
                place.mkdir(parents=True)
                write_adapter(place, self.spec, tensors[kind], modules, {**record, "code": version})
                sync_directory(place)

        return write

    def export(self, state: TrainState) -> None:
        write = self.snapshot(state)
        on_main(lambda: self._put(write))

    def _put(self, write: Callable[[Path], None]) -> None:
        draft = self.target.with_name("adapter.weft_draft")
        shutil.rmtree(draft, ignore_errors=True)
        try:
            write(draft)
            put_in_place(draft / "adapter", self.target)
        except OSError as error:
            raise ValueError(
                f"{self.target}: the adapters cannot be written ({error.strerror or error}); make room or choose another place"
            ) from error
        finally:
            shutil.rmtree(draft, ignore_errors=True)

    def _require_kind(self, start: Start | None) -> None:
        args, model = self.args, self.args.model
        if args.lora.load_in_4bit and args.lora.load_in_8bit:
            raise ValueError("--load_in_4bit and --load_in_8bit: a matrix is in one of them; leave one out")
        for name in ("from_scratch", "llm_path", "vit_path", "mask_path"):
            if value := getattr(model, name):
                raise ValueError(
                    f"--{name} {value}: adapters are a difference to the weights of one model directory; leave it out, or make "
                    "the model first and name it with --model_path"
                )
        if start is not None and start.published:
            raise ValueError(
                f"--resume_from {start.path}: holds whole weights; with --lora_enable name them with --model_path"
            )
        if start is not None and not _holds_adapters(start):
            raise ValueError(
                f"{start.path}: is a checkpoint of a whole model; export it (python -m scripts.convert.export) and name that "
                "with --model_path, then train adapters on it"
            )
        try:
            peft()
            if args.lora.bits:
                bitsandbytes()
        except ImportError as error:
            raise ValueError(str(error)) from error

    def _require_same_base(self, place: Path) -> None:
        file = find_adapter(place, "ema") / RECORD
        known = json.loads(file.read_text(encoding="utf-8"))["base"] if file.is_file() else {}
        now = self.record["base"]
        if known and known["fingerprint"] != now["fingerprint"]:
            raise ValueError(
                f"{place}: its adapters are a difference to {known['path']} ({known['weights']}), and the weights of "
                f"--model_path {now['path']} ({now['weights']}) are others; name those that they were trained on"
            )

    def _require_not_whole(self, saved: set[str], layers: Iterable[str], what: str) -> None:
        if found := next((name for name in sorted(layers) if group_of(f"{name}.weight") in saved), None):
            raise ValueError(
                f"--lora_modules_to_save {group_of(f'{found}.weight')}: would train as a whole what {what}, such as {found}; "
                "leave it out of one"
            )

    def _require_begin(self, begin: Adapter, adapted: Mapping[str, int]) -> None:
        if begin.adapted == adapted:
            return
        layer = sorted(set(begin.adapted.items()) ^ set(adapted.items()))[0][0]
        there, here = begin.adapted.get(layer, "none"), adapted.get(layer, "none")
        raise ValueError(
            f"--lora_resume_path {begin.folder}: its adapters are not those that the flags ask for, first at {layer} (rank "
            f"{there} there, {here} here); set --lora_target and --lora_r as they were"
        )


ADAPTER_FILES: Sequence[str] = ("adapter_config.json", "adapter_model.safetensors", RECORD)


def tuning_of(args: Args, source: ModelSource, start: Start | None) -> Tuning:
    """What the flags ask for."""
    return (AdapterTuning if args.params.lora_enable else Tuning)(args, source, start)


def _holds_adapters(start: Start | None) -> bool:
    if start is None or start.published:
        return False
    flags = json.loads((start.path / ARGS).read_text(encoding="utf-8"))
    return bool(flags.get("lora_enable"))


def _words(text: str) -> set[str]:
    return {word.strip() for word in text.split(",") if word.strip()}
