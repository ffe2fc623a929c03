"""What a run starts from: which files say what the model is, and which hold its parts' values.

Read: the JSON files of a model directory (ours or a published one), with or without weights beside them; or, for a fresh model,
Hugging Face directories of the decoder and the tower. Flags supply what the files leave open. A flag that contradicts a model
directory is an error that names both; only where a part is built fresh (`--llm_path`, or `--vit_path` with `--from_scratch`) does
the flag win over that directory.

How many layers the tower has: `num_hidden_layers` of `vit_config.json` + 1 + `vit_select_layer`. That is the published flag, -2
unless said otherwise, so that published files count a layer that is not built. Our own directories have a `bagel_config.json`;
one that does not name `vit_select_layer` means -1: the file counts what is built. Where there are weights they have to agree,
with one exception: some published trainers write the number of built layers into a directory without `bagel_config.json`.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from modeling.autoencoder import AutoEncoderConfig, read_config
from modeling.bagel.config import BagelConfig
from modeling.heads import head_class
from modeling.huggingface import is_huggingface, read_llm_config, read_vit_config
from modeling.qwen2.config import Qwen2Config
from modeling.towers import tower_named
from modeling.weights import Weights, find_weights, open_weights

logger = logging.getLogger(__name__)

FLAGS: Mapping[str, tuple[str, str]] = {
    "layer_module": ("llm", "layer_module"),
    "llm_qk_norm": ("llm", "qk_norm"),
    "tie_word_embeddings": ("llm", "tie_word_embeddings"),
    "vit_rope": ("vit", "rope"),
    "vit_patch_size": ("vit", "patch_size"),
    "vit_select_layer": ("bagel", "vit_select_layer"),
    "vit_max_num_patch_per_side": ("bagel", "vit_max_num_patch_per_side"),
    "latent_patch_size": ("bagel", "latent_patch_size"),
    "max_latent_size": ("bagel", "max_latent_size"),
    "connector_act": ("bagel", "connector_act"),
    "interpolate_pos": ("bagel", "interpolate_pos"),
}
"""Flag -> the file (`PART_config.json`) and key that mean the same."""

FRESH: Mapping[str, Mapping[str, Any]] = {
    "llm": {"layer_module": "Qwen2MoTDecoderLayer", "qk_norm": True, "tie_word_embeddings": False},
    "vit": {"rope": False},
    "bagel": {"max_latent_size": 32},
}
"""What a part built from a Hugging Face directory has unless a flag says otherwise: the published trainer's defaults."""

TABLES = {
    "latent_pos_embed.pos_embed": "max_latent_size",
    "vit_pos_embed.pos_embed": "vit_max_num_patch_per_side",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """A model and where its parts come from.

    Attributes:
        config: what the model is.
        model_path: directory of configurations and, if trained, weights.
        llm_path: Hugging Face directory that gives the decoder's values.
        vit_path: Hugging Face directory, or one with `vit_model.safetensors`, that gives the tower's values.
        mask_path: directory that gives the mask head's values, as far as it has them.
        vae_path: where the autoencoder is.
        tokenizer_path: directory with the tokenizer's files.
        from_scratch: what no directory named above gives starts from random values; weights in `model_path` are not read.
        copy_init_moe: start the generation expert as a copy of the understanding expert. None: where `llm_path` gives that one.
        llm_json, vit_json: the files that the configuration was read from: other keys are kept for export.
    """

    config: BagelConfig
    model_path: Path
    llm_path: Path | None = None
    vit_path: Path | None = None
    mask_path: Path | None = None
    vae_path: Path
    tokenizer_path: Path
    from_scratch: bool = False
    copy_init_moe: bool | None = None
    llm_json: Mapping[str, Any]
    vit_json: Mapping[str, Any]


@dataclass(slots=True, kw_only=True)
class _Said:
    """Keys by file, and who said each: for messages."""

    llm: dict[str, Any]
    vit: dict[str, Any]
    bagel: dict[str, Any]
    by: dict[tuple[str, str], str] = field(default_factory=dict)

    def put(self, part: str, values: Mapping[str, Any], by: str) -> None:
        getattr(self, part).update(values)
        self.by.update({(part, key): by for key in values})


def read_source(
    model_path: str | Path,
    *,
    llm_path: str | Path | None = None,
    vit_path: str | Path | None = None,
    vae_path: str | Path | None = None,
    mask_path: str | Path | None = None,
    from_scratch: bool = False,
    copy_init_moe: bool | None = None,
    flags: Mapping[str, Any] | None = None,
) -> ModelSource:
    """Read every configuration and check that they, the flags and the weights' keys go together; reads no weights.

    Args:
        model_path, llm_path, vit_path, vae_path, mask_path, from_scratch, copy_init_moe: see `ModelSource`.
        flags: of `FLAGS`, by name; None: not given.

    Raises:
        ValueError: naming the file, key or flag that is missing, unreadable or contradicts another.
    """
    given = {name: value for name, value in (flags or {}).items() if value is not None}
    root, ae = Path(model_path), _autoencoder(model_path, vae_path)
    llm_dir = Path(llm_path) if llm_path else None
    vit_dir = Path(vit_path) if vit_path else None
    mask_dir = Path(mask_path) if mask_path else None
    for flag, place in (("llm_path", llm_dir), ("vit_path", vit_dir), ("mask_path", mask_dir)):
        if place is not None and not place.is_dir():
            raise ValueError(f"--{flag} {place}: there is no such directory")
    if llm_dir is not None and not from_scratch:
        raise ValueError(
            f"--llm_path {llm_dir}: gives the language model only, the other parts would start from random values; "
            "say so with --from_scratch True, or leave --llm_path out to take the weights of --model_path"
        )
    fresh_vit = vit_dir is not None and from_scratch and is_huggingface(vit_dir)
    # With --from_scratch the files alone describe the model: what flags say may differ from weights that are not read.
    weights = None if from_scratch else _weights(root)
    said = _Said(llm={}, vit={}, bagel={})
    own = _read_directory(said, root, needs_llm=llm_dir is None, needs_vit=not fresh_vit)
    if weights is not None:
        _put_stored(said, weights, own)
        _require_llm_depth(said, weights)
    _put_flags(said, given, _put_fresh(said, llm_dir, vit_dir if fresh_vit else None))
    said.vit["num_hidden_layers"] = _vit_depth(said, weights, own, root)
    said.bagel.pop("vit_select_layer", None)
    if fresh_vit and "vit_max_num_patch_per_side" not in said.bagel:
        said.bagel["vit_max_num_patch_per_side"] = said.vit["image_size"] // said.vit["patch_size"]
    if mask_dir is not None:
        _put_mask(said, mask_dir, root)
    config = _config(said, ae, root)
    if said.vit.get("rope") and not config.vit.rope:
        raise ValueError(
            f"--vit_rope True: the tower of {root} is SAM's, which has positions of its own; leave it out"
        )
    if fresh_vit and not config.vit.rope:
        _require_positions(config, vit_dir)
    return ModelSource(
        config=config,
        model_path=root,
        llm_path=llm_dir,
        vit_path=vit_dir,
        mask_path=mask_dir,
        vae_path=Path(vae_path) if vae_path else root,
        tokenizer_path=llm_dir if llm_dir is not None and (llm_dir / "tokenizer.json").is_file() else root,
        from_scratch=from_scratch,
        copy_init_moe=copy_init_moe,
        llm_json=said.llm,
        vit_json=said.vit,
    )


def _autoencoder(model_path: str | Path, vae_path: str | Path | None) -> AutoEncoderConfig:
    if vae_path and not Path(vae_path).exists():
        raise ValueError(f"--vae_path {vae_path}: there is no such file or directory")
    return read_config(vae_path or model_path)


def _weights(root: Path) -> Weights | None:
    file = find_weights(root, "ema") or find_weights(root, "model")
    return None if file is None else open_weights(file)


def _read_directory(said: _Said, root: Path, *, needs_llm: bool, needs_vit: bool) -> bool:
    """Read a model directory's files; returns whether it is one of ours (it has a `bagel_config.json`)."""
    for part, needed in (("llm", needs_llm), ("vit", needs_vit), ("bagel", False)):
        file = root / f"{part}_config.json"
        if needed or (part == "bagel" and file.is_file()):
            said.put(part, _read(file), str(file))
    known = {f.name for f in fields(BagelConfig)} - {"llm", "vit", "latent_channels", "vae_downsample"}
    known |= {"vit_select_layer"}
    if unknown := sorted(set(said.bagel) - known):
        raise ValueError(
            f"{root / 'bagel_config.json'}: unknown key '{unknown[0]}'; known are {', '.join(sorted(known))}"
        )
    if said.bagel.get("head_reads", "self") not in ("self", "previous"):
        raise ValueError(
            f"{root / 'bagel_config.json'}: head_reads must be 'self' or 'previous', not '{said.bagel['head_reads']}'"
        )
    return (root / "bagel_config.json").is_file()


def _put_stored(said: _Said, weights: Weights, own: bool) -> None:
    """What the weights show. In published directories it overrules the files, as published loaders do; a part that the weights
    lack is not struck out of the configuration, so that loading can say that it is missing.
    """
    keys, by = weights.shapes, str(weights.name)
    mot, moe = (any(part in key for key in keys) for part in ("q_proj_moe_gen", "mlp_moe_gen"))
    qk_norm = any(key.endswith("self_attn.q_norm.weight") for key in keys)
    untied = "language_model.lm_head.weight" in keys
    learned = any(key.endswith("embeddings.position_embedding.weight") for key in keys)
    shown: list[tuple[str, str, Any, bool]] = [  # file, key, value, whether a tensor proves it
        ("llm", "layer_module", f"Qwen2{'MoT' if mot else 'MoE' if moe else ''}DecoderLayer", mot or moe),
        ("llm", "qk_norm", qk_norm, qk_norm),
        *(("bagel", TABLES[key], side, True) for key, side in weights.table_sides.items()),
    ]
    # These two are one tensor each: where it is not there it may be missing, and the model need not be another.
    if untied:
        shown.append(("llm", "tie_word_embeddings", False, True))
    if learned or weights.rotary:
        shown.append(("vit", "rope", not learned, True))
    width = said.llm.get("hidden_size")
    for name, shape in weights.tables.items():
        if width is not None and shape != (weights.table_sides[name] ** 2, width):
            raise ValueError(
                f"{by}: {name} is {list(shape)}; a table of positions has side x side rows of the decoder's width, {width}"
            )
    for part, key, value, proven in shown:
        held = getattr(said, part)
        if key not in held:
            said.put(part, {key: value}, by)
        elif proven and not own and held[key] != value:
            logger.info(
                "%s: %s says %s, the weights show %s, which counts", said.by[part, key], key, held[key], value
            )
            said.put(part, {key: value}, by)
        elif part == "bagel" and held[key] != value:
            logger.info("%s: %s is %s, the weights were trained with %s; the tables are computed, so they fit",
                        said.by[part, key], key, held[key], value)  # fmt: skip


def _put_fresh(said: _Said, llm_dir: Path | None, vit_dir: Path | None) -> set[tuple[str, str]]:
    """What the Hugging Face directories of fresh parts say; returns the keys that flags may say otherwise."""
    fresh = set()
    if llm_dir is not None:
        said.put("llm", {**read_llm_config(llm_dir), **FRESH["llm"]}, f"{llm_dir}/config.json")
        fresh |= {("llm", key) for key in FRESH["llm"]}
    if vit_dir is not None:
        said.put("vit", {**read_vit_config(vit_dir), **FRESH["vit"]}, f"{vit_dir}/config.json")
        said.bagel["vit_select_layer"] = tower_named(said.vit).select_layer
        fresh |= {("vit", key) for key in FRESH["vit"]}
    if llm_dir is not None or vit_dir is not None:
        said.bagel.setdefault("max_latent_size", FRESH["bagel"]["max_latent_size"])
        fresh |= {(part, key) for part, key in FLAGS.values() if part == "bagel"}
    return fresh


def _put_flags(said: _Said, flags: Mapping[str, Any], fresh: set[tuple[str, str]]) -> None:
    for name, value in flags.items():
        part, key = FLAGS[name]
        held = getattr(said, part)
        if key in held and held[key] != value and (part, key) not in fresh:
            raise ValueError(
                f"--{name} {value} contradicts {said.by[part, key]}, where {key} is {held[key]}; leave the flag out"
            )
        said.put(part, {key: value}, f"--{name}")


def _put_mask(said: _Said, mask_dir: Path, root: Path) -> None:
    """What the directory of `--mask_path` says of the mask head that `bagel_config.json` leaves open."""
    heads = said.bagel.get("heads", {})
    if "mask" not in heads:
        raise ValueError(
            f"--mask_path {mask_dir}: the model has no mask head; add one to {root / 'bagel_config.json'}, for instance "
            '"heads": {"mask": {"type": "sam"}}'
        )
    options = head_class("mask", heads["mask"]).options_from(mask_dir, heads["mask"])
    said.bagel["heads"] = {**heads, "mask": options}


def _vit_depth(said: _Said, weights: Weights | None, own: bool, root: Path) -> int:
    """Layers of the tower: the rule at the top of this file."""
    counted = said.vit.get("num_hidden_layers")
    if not isinstance(counted, int):
        raise ValueError(
            f"{said.by.get(('vit', 'hidden_size'), root / 'vit_config.json')}: lacks num_hidden_layers"
        )
    select = said.bagel.get("vit_select_layer")
    built = counted + 1 + (select if select is not None else -1 if own else -2)
    if not 0 < built <= counted:
        raise ValueError(
            f"--vit_select_layer {select}: leaves {built} layers of the {counted} that the tower has"
        )
    stored = weights.vit_depth if weights is not None else 0
    if weights is None or stored in (0, built):
        return built
    if select is None and not own and stored == counted:
        logger.info("%s: holds %d layers of the vision tower, as many as vit_config.json counts; published loaders build one "
                    "less and drop the last", weights.name, stored)  # fmt: skip
        return stored
    others = f"{built} or {counted}" if select is None and not own else f"{built}"
    raise ValueError(
        f"{weights.name}: holds {stored} layers of the vision tower; {root / 'vit_config.json'} has num_hidden_layers {counted}, "
        f"for which {others} are expected (num_hidden_layers + 1 + vit_select_layer). The file is cut short or of another tower: "
        "copy it again, or mend the configuration"
    )


def _require_llm_depth(said: _Said, weights: Weights) -> None:
    """Fewer layers than the file counts are missing tensors, which loading names; more would be left out without a word."""
    counted, stored = said.llm.get("num_hidden_layers"), weights.llm_depth
    if isinstance(counted, int) and stored > counted:
        raise ValueError(
            f"{weights.name}: holds {stored} layers of the language model; {said.by['llm', 'num_hidden_layers']} has "
            f"num_hidden_layers {counted}: the file is of another model, or mend the configuration"
        )


def _config(said: _Said, ae: AutoEncoderConfig, root: Path) -> BagelConfig:
    try:
        return BagelConfig(
            llm=Qwen2Config.from_json(said.llm),
            vit=tower_named(said.vit).read(said.vit),
            latent_channels=ae.z_channels,
            vae_downsample=ae.downsample,
            **said.bagel,
        )
    except TypeError as e:
        raise ValueError(f"{root}: a model file lacks a key: {e}") from e


def _require_positions(config: BagelConfig, vit_dir: Path | None) -> None:
    asked, known = config.vit_max_num_patch_per_side, config.vit.positions_per_side
    if asked > known:
        raise ValueError(
            f"--vit_max_num_patch_per_side {asked}: the tower of {vit_dir} has learned {known} positions per side; give at most "
            f"{known} (pictures up to {known * config.vit.patch_size} pixels), or --vit_rope True"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, json.JSONDecodeError, TypeError, ValueError) as e:
        raise ValueError(f"{file}: cannot be read ({e}); --model_path must name a model directory") from e
