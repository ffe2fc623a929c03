"""Low-rank adapters (LoRA, through PEFT) beside frozen matrices, and the directories that hold them.

A PEFT directory is a difference to a model: for an adapted matrix `scale * B A`; for what was trained as a whole (PEFT's
`modules_to_save`) its new values. PEFT loads it; so does this module, without PEFT, by adding it up where weights are read.
`weft_adapter.json` beside PEFT's two files says what it is a difference to.

Layers: Hu et al., arXiv:2106.09685; `rslora`: Kalajdzievski, arXiv:2312.03732; files: PEFT's own (adapter_config.json,
adapter_model.safetensors).
"""

import difflib
import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from modeling.optional import require
from modeling.quantised import Precision, rounded
from modeling.qwen2.mot import GEN
from modeling.weights import find_weights, unreadable, weight_files

CONFIG, WEIGHTS, RECORD = "adapter_config.json", "adapter_model.safetensors", "weft_adapter.json"
FORMAT = "weft-adapter/1"
PREFIX = "base_model.model."
"""Of every name in PEFT's files."""
BASE = ".base_layer"
ADAPTER = re.compile(r"^(?P<layer>.+)\.lora_(?P<half>[AB])\.default\.weight$")
logger = logging.getLogger(__name__)

NEVER = ("language_model.lm_head", "language_model.model.embed_tokens")
SAMPLES, SAMPLE_BYTES = 64, 1 << 16

_LAYER = r"language_model\.model\.layers\.\d+\."
_UND, _GEN = rf"{_LAYER}self_attn\.[qkvo]_proj", rf"{_LAYER}self_attn\.[qkvo]_proj{GEN}"
_UND_MLP, _GEN_MLP = rf"{_LAYER}mlp\.(gate|up|down)_proj", rf"{_LAYER}mlp{GEN}\.(gate|up|down)_proj"
_VIT = r"vit_model\..+\.layers\.\d+\.(self_attn\.(q|k|v|out)_proj|mlp\.fc[12])"
TARGETS: Mapping[str, str] = {
    "llm_attn": f"{_UND}|{_GEN}",
    "llm_all": f"{_UND}|{_UND_MLP}|{_GEN}|{_GEN_MLP}",
    "mot_und": f"{_UND}|{_UND_MLP}",
    "mot_gen": f"{_GEN}|{_GEN_MLP}",
    "vit": _VIT,
    "vision": _VIT,
    "connector": r"connector\.fc[12]",
    "merger": r"connector\.fc[12]",
    "flow": r"time_embedder\.mlp\.[02]|vae2llm|llm2vae",
}
"""Name of a set of matrices -> pattern of the names of their layers. Heads are added by their own names; `vision` and `merger`
are the published detection system's names of `vit` and `connector`."""

Values = Callable[[str, torch.Size], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSpec:
    """Adapters to be made.

    Attributes:
        pattern: matches the names of the layers that get one (`target_pattern`).
        rank, alpha, dropout: of each.
        rslora: scale by alpha / sqrt(rank) instead of alpha / rank.
    """

    pattern: str
    rank: int
    alpha: int
    dropout: float = 0.0
    rslora: bool = False


def target_pattern(model: nn.Module, names: str, flag: str) -> str:
    """Names of sets of matrices, by comma -> a pattern of exactly the layers that are meant.

    Args:
        model: with its plain layers.
        names: rows of `TARGETS`, names of heads, or `re:PATTERN`.
        flag: which asks for them, for messages.

    Raises:
        ValueError: naming what is unknown, matches nothing, or cannot be adapted.
    """
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    heads = {name.split(".")[1] for name in linear if name.startswith("heads.")}
    known = {**TARGETS, **{head: rf"heads\.{head}\..+" for head in sorted(heads)}}
    patterns: list[str] = []
    for name in filter(None, (word.strip() for word in names.split(","))):
        pattern = name.removeprefix("re:") if name.startswith("re:") else known.get(name)
        if pattern is None:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{flag} {name}: is none of {', '.join(known)}, re:PATTERN{hint}")
        patterns.append(_exactly(pattern, linear, f"{flag} {name}"))
    if not patterns:
        raise ValueError(f"{flag}: names nothing; choose from {', '.join(known)}, re:PATTERN")
    return "|".join(dict.fromkeys(patterns))


def _exactly(pattern: str, linear: set[str], asked: str) -> str:
    """The pattern if it means layers by their numbers, else their names one by one."""
    try:
        found = sorted(name for name in linear if re.fullmatch(pattern, name))
    except re.error as error:
        raise ValueError(f"{asked}: is no regular expression ({error})") from error
    if not found:
        raise ValueError(f"{asked}: the model has no such matrices")
    if taken := [name for name in found if name in NEVER]:
        raise ValueError(
            f"{asked}: means {taken[0]}, whose matrix is used without its layer; train it as a whole "
            "(--lora_modules_to_save embeddings)"
        )
    return (
        pattern if r"\d+" in pattern and not pattern.startswith("heads") else "|".join(map(re.escape, found))
    )


def peft() -> Any:
    """The library.

    Raises:
        ImportError: naming the package and how to install it.
    """
    return require("peft", package="peft", extra="peft", why="training adapters (--lora_enable)")


def add_adapters(model: nn.Module, spec: LoraSpec) -> None:
    """Put adapters beside the matrices that `spec` means; a model on the meta device stays there.

    What required gradients before still does: which of it is trained is `train.param_manager.freeze`'s to say. The matrices'
    names get `.base_layer` in them.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    peft().inject_adapter_in_model(_peft_config(spec), model, low_cpu_mem_usage=True)
    for p in trainable:
        p.requires_grad_(True)


def _peft_config(spec: LoraSpec, **more: Any) -> Any:
    return peft().LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        use_rslora=spec.rslora,
        target_modules=f"({spec.pattern})",
        **more,
    )


def base_name(name: str) -> str:
    """Name that a parameter had before adapters were added."""
    return name.replace(BASE, "")


def adapted_values(values: Values, seed: int, start: "Adapter | None" = None) -> Values:
    """Starting values of a model with adapters.

    Args:
        values: of the model without.
        seed: of the run.
        start: take the adapters, and what was trained with them, from here. Else `A` is drawn as `torch.nn.Linear` draws its
            matrix, and `B` is 0: the adapters change nothing at first.
    """

    def value(name: str, shape: torch.Size) -> Tensor:
        found = ADAPTER.match(name)
        if found is None:
            plain = base_name(name)
            return values(plain, shape) if start is None else start.whole(plain, values(plain, shape))
        if start is not None:
            return start.half(f"{found['layer']}.weight", found["half"])
        if found["half"] == "B":
            return torch.zeros(shape)
        digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") % 2**63)
        return (torch.rand(shape, generator=generator) * 2 - 1) / math.sqrt(shape[1])

    return value


def whole_modules(model: nn.Module, trained: Collection[str]) -> list[str]:
    """The modules all of whose parameters are trained as they are: PEFT's `modules_to_save`.

    Args:
        model: with its adapters.
        trained: names of trained parameters; those of adapters do not count.
    """
    plain = {name for name in trained if not ADAPTER.match(name)}

    def walk(module: nn.Module, name: str) -> Iterator[str]:
        own = {f"{name}.{n}" for n, _ in module.named_parameters()}
        if own and own <= plain and not isinstance(module, nn.ModuleList | nn.ModuleDict):
            yield name
            return
        for child, part in module.named_children():
            yield from walk(part, f"{name}.{child}")

    return [found for child, part in model.named_children() for found in walk(part, child)]


def write_adapter(
    folder: Path, spec: LoraSpec, tensors: Mapping[str, Tensor], modules: list[str], record: Mapping[str, Any]
) -> None:
    """Write a PEFT directory.

    Args:
        folder: an empty directory.
        spec: of the adapters.
        tensors: every trained parameter by its name in the model.
        modules: those trained as a whole (`whole_modules`).
        record: what it is a difference to, and where it comes from; `base` holds `path` and `weights`.
    """
    named = {}
    for name, x in tensors.items():
        found = ADAPTER.match(name)
        key = f"{found['layer']}.lora_{found['half']}.weight" if found else name
        named[PREFIX + key] = x.detach().float().cpu().contiguous()
    save_file(dict(sorted(named.items())), folder / WEIGHTS, metadata={"format": "pt"})
    config = _peft_config(
        spec,
        modules_to_save=modules or None,
        base_model_name_or_path=record["base"]["path"],
        inference_mode=True,
    )
    config.save_pretrained(folder)
    text = json.dumps({"format": FORMAT, **record}, indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A PEFT directory, read one tensor at a time.

    Attributes:
        folder: the directory.
        scale: that `B A` is multiplied by.
        shapes: name of a parameter of the model -> shape that it has to have there.
        record: `weft_adapter.json`; empty if PEFT itself wrote the directory.
        precision: in what the base was kept while this was trained; None: as it is.
    """

    folder: Path
    scale: float
    shapes: Mapping[str, tuple[int, ...]]
    record: Mapping[str, Any]
    precision: Precision | None
    _read: Callable[[str], Tensor]
    _sizes: Mapping[str, tuple[int, ...]]

    def base_weights(self, model_dir: str | Path, otherwise: str) -> str:
        """The kind of weights (`ema`, `model`) of a directory that this is a difference to; others than it was are told.

        Args:
            model_dir: of the base.
            otherwise: taken if the adapters do not say.
        """
        base = self.record.get("base", {})
        kind = base.get("weights", otherwise)
        if base and fingerprints(Path(model_dir), kind) != base["fingerprint"]:
            logger.warning("%s: was trained on other weights than those of %s; on those of %s", self.folder, model_dir,
                           base["path"])  # fmt: skip
        return kind

    def apply(self, name: str, value: Tensor) -> Tensor:
        """A parameter of the base -> that of the model with the adapters in it, float32 where they change it."""
        value = self.whole(name, value)
        layer, _, kind = name.rpartition(".")
        if self.precision is not None and kind == "weight" and self.precision.covers(layer):
            value = rounded(value, self.precision)
        if f"{layer}.lora_A.weight" in self._sizes and kind == "weight":
            value = value.float() + self.scale * (self.half(name, "B") @ self.half(name, "A"))
        return value

    def whole(self, name: str, value: Tensor) -> Tensor:
        """A parameter of the base, or what was trained in its place."""
        return self._read(PREFIX + name) if name in self._sizes else value

    def half(self, name: str, half: str) -> Tensor:
        """`A` (`rank i`) or `B` (`o rank`) beside the matrix of this name, float32."""
        return self._read(f"{PREFIX}{name.removesuffix('.weight')}.lora_{half}.weight").float()

    @property
    def adapted(self) -> dict[str, int]:
        """Name of each layer that has an adapter -> its rank."""
        ends = ".lora_A.weight"
        return {key.removesuffix(ends): size[0] for key, size in self._sizes.items() if key.endswith(ends)}

    def require_fits(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that every tensor belongs to a parameter of the model.

        Args:
            shapes: of the model's parameters.

        Raises:
            ValueError: naming one that does not.
        """
        for name, shape in self.shapes.items():
            if name not in shapes:
                close = difflib.get_close_matches(name, shapes, n=1)
                hint = f" (it has {close[0]})" if close else ""
                raise ValueError(f"{self.folder / WEIGHTS}: changes {name}, which the model lacks{hint}")
            if tuple(shapes[name]) != shape:
                raise ValueError(
                    f"{self.folder / WEIGHTS}: {name} would be {list(shape)}, the model's is {list(shapes[name])}"
                )


def find_adapter(path: str | Path, kind: str) -> Path:
    """The PEFT directory meant by a path: itself, or, of what a run or a step left, the one of a kind (`ema`, `model`).

    Raises:
        ValueError: if there is none.
    """
    root = Path(path)
    places = (root, root / kind, root / "adapter" / kind)
    found = next((place for place in places if (place / CONFIG).is_file()), None)
    if found is None:
        raise ValueError(
            f"{root}: holds no adapters ({CONFIG}), neither here nor in {kind}/ or adapter/{kind}/"
        )
    return found


def open_adapter(path: str | Path, kind: str = "ema") -> Adapter:
    """Open a PEFT directory of LoRA adapters, ours or another's; see `find_adapter`.

    Raises:
        ValueError: naming the file that is missing or damaged, or the key that asks for what is not done here.
    """
    folder = find_adapter(path, kind)
    config = _read_json(folder / CONFIG)
    record = _read_json(folder / RECORD) if (folder / RECORD).is_file() else {}
    _require_plain_lora(folder / CONFIG, config)
    try:
        store = safe_open(folder / WEIGHTS, framework="pt")
    except (OSError, SafetensorError) as error:
        raise unreadable(folder / WEIGHTS, error) from error
    sizes = {k.removeprefix(PREFIX): tuple(store.get_slice(k).get_shape()) for k in store.keys()}  # noqa: SIM118 - not a dict
    rank = config["r"]
    return Adapter(
        folder=folder,
        scale=config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank),
        shapes=_changed_shapes(folder / WEIGHTS, sizes, rank),
        record=record,
        precision=Precision(**record["precision"]) if record.get("precision") else None,
        _read=store.get_tensor,
        _sizes=sizes,
    )


def _changed_shapes(
    file: Path, sizes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in sizes.items():
        layer, is_half, _ = key.partition(".lora_")
        if not is_half:
            shapes[key] = shape
            continue
        first, second = sizes.get(f"{layer}.lora_A.weight"), sizes.get(f"{layer}.lora_B.weight")
        if first is None or second is None or first[0] != rank or second[1] != rank:
            raise ValueError(f"{file}: {key}: needs A and B of rank {rank}, and has {first} and {second}")
        shapes[f"{layer}.weight"] = (second[0], first[1])
    return shapes


def _require_plain_lora(file: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')}; LORA alone is read here")
    if not all(isinstance(config.get(key), int) and config[key] > 0 for key in ("r", "lora_alpha")):
        raise ValueError(f"{file}: r and lora_alpha must be whole numbers above 0")
    unread = {
        "use_dora": False,
        "fan_in_fan_out": False,
        "bias": "none",
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    for key, plain in unread.items():
        if config.get(key, plain) not in (plain, None):
            raise ValueError(
                f"{file}: {key} is {config[key]}, which is not read here; merge the adapters with PEFT first"
            )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file}: is no JSON object")
    return value


def fingerprints(model_dir: Path, kind: str) -> dict[str, str]:
    """What tells weights of a kind (`ema`, `model`) from others: name of each file -> a hash; empty if there are none."""
    file = find_weights(model_dir, kind)
    return {} if file is None else {part.name: _fingerprint(part) for part in weight_files(file)}


def _fingerprint(file: Path) -> str:
    """Hash of a file's size and of samples all over it: files of weights are too large to be read for that."""
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=16)
    with file.open("rb") as f:
        for i in range(SAMPLES):
            f.seek(i * max(0, size - SAMPLE_BYTES) // (SAMPLES - 1))
            digest.update(f.read(SAMPLE_BYTES))
    return digest.hexdigest()
