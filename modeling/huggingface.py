"""Hugging Face directories as a starting point: a Qwen2 / Qwen2.5 causal language model, a SigLIP vision tower.

In: `config.json` and `model.safetensors` (or shards with an index). Out: our configurations' keys, and `Weights` under our names.
Nothing of `transformers` is needed to read them.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from modeling.qwen2.mot import GEN
from modeling.siglip.model import linear_patch_embedding
from modeling.weights import Weights, find_weights, open_weights

logger = logging.getLogger(__name__)

TOWER = "vit_model.safetensors"
"""A vision tower alone, in our form: keys without the `vit_model.` prefix (`train/main_siglip.py` writes it)."""
EMBEDDINGS, HEAD = "language_model.model.embed_tokens.weight", "language_model.lm_head.weight"
PATCHES = "embeddings.patch_embedding.weight"
TOWER_PREFIX = "vit_model.vision_model."
SAM_TOWER, SAM_PATCHES = "sam_vision_model", "vision_encoder.patch_embed.projection.weight"

SIGLIP_DEFAULTS: Mapping[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
}
"""What transformers' SiglipVisionConfig has where a file is silent; published files name only what differs."""

QWEN2_DEFAULTS: Mapping[str, Any] = {
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "tie_word_embeddings": False,
}


def is_huggingface(path: Path) -> bool:
    """Whether a directory is one of Hugging Face's: it has a `config.json` and no tower in our form."""
    return (path / "config.json").is_file() and not (path / TOWER).is_file()


def read_llm_config(path: Path) -> dict[str, Any]:
    """The keys of an `llm_config.json`, from a Qwen2 model's `config.json`; keys that do not shape the network are kept.

    Raises:
        ValueError: if it is another kind of model, or uses what the decoder here does not have.
    """
    file = path / "config.json"
    values = {**QWEN2_DEFAULTS, **_read(file, "--llm_path", "a Qwen2 or Qwen2.5 causal language model")}
    if values.get("model_type") != "qwen2":
        raise ValueError(
            f"--llm_path {file}: model_type is {values.get('model_type')!r}; only qwen2 can be read"
        )
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    values["rope_theta"] = float(values.get("rope_theta", rope.get("rope_theta", 10000.0)))
    values.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    unusual = {
        "hidden_act": (values["hidden_act"], "silu"),
        "rope_type": (kind, "default"),
        "use_sliding_window": (values.get("use_sliding_window", False), False),
    }
    _require_usual(file, "--llm_path", unusual)
    return values


def read_vit_config(path: Path) -> dict[str, Any]:
    """The keys of a `vit_config.json`, from the `config.json` of SAM or of a SigLIP model (the tower, or tower and text model).

    Raises:
        ValueError: if it is another kind of model, or uses what the tower here does not have.
    """
    file = path / "config.json"
    values = _read(file, "--vit_path", "a SigLIP vision tower")
    if values.get("model_type") == "siglip":
        values = {"model_type": "siglip_vision_model", **values.get("vision_config", {})}
    if values.get("model_type") in ("sam", SAM_TOWER):
        return {**values.get("vision_config", values), "model_type": SAM_TOWER}
    if not str(values.get("model_type", "")).startswith("siglip_"):
        raise ValueError(
            f"--vit_path {file}: model_type is {values.get('model_type')!r}; only SigLIP and SAM can be read"
        )
    values = {**SIGLIP_DEFAULTS, **values}
    unusual = {
        "hidden_act": (values["hidden_act"], "gelu_pytorch_tanh"),
        "num_channels": (values["num_channels"], 3),
    }
    _require_usual(file, "--vit_path", unusual)
    return values


def llm_weights(
    path: Path, wanted: Mapping[str, tuple[int, ...]], *, copy_init_moe: bool
) -> tuple[Weights, frozenset[str]]:
    """A language model's tensors under our names.

    Args:
        path: directory.
        wanted: our names of the decoder's tensors and their shapes.
        copy_init_moe: give the generation expert the understanding expert's tensors.

    Returns:
        the tensors, and the names that may be missing: head norms, which Qwen2 does not have, and the generation expert if it is
        not copied. A tied output layer that is wanted as a tensor of its own is given the embeddings.

    Raises:
        ValueError: if there are no weights, or the output layer is to be tied and is not.
    """
    store = _open(path, "--llm_path")
    keys, absent = {}, set()
    for name in wanted:
        key = name.removeprefix("language_model.")
        if GEN in key:
            key = key.replace(GEN, "") if copy_init_moe else ""
        if name == HEAD and key not in store.shapes:
            key = EMBEDDINGS.removeprefix("language_model.")
            logger.info(
                "%s: the output layer is tied to the embeddings; it starts as a copy of them", store.name
            )
        if key in store.shapes:
            keys[name] = key
        elif not key or ".q_norm." in key or ".k_norm." in key:
            absent.add(name)
    if HEAD not in wanted and "lm_head.weight" in store.shapes:
        raise ValueError(
            f"--tie_word_embeddings True: {store.name} has an output layer of its own (lm_head.weight), which would be dropped; "
            "leave the flag out"
        )
    return store.renamed(keys), frozenset(absent)


def vit_weights(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> tuple[Weights, frozenset[str]]:
    """A tower's tensors under our names (`vit_model.…`): in our form, or Hugging Face's with its convolution made linear.

    Raises:
        ValueError: if there are none, or the file in our form is of another tower.
    """
    if not is_huggingface(path):
        store = _open_file(path / TOWER, "--vit_path")
        return store.renamed({f"vit_model.{key}": key for key in store.shapes}), frozenset()
    store = _open(path, "--vit_path")
    if SAM_PATCHES in store.shapes:
        encoder = "vision_encoder."
        keys = {name: encoder + name.removeprefix(f"{TOWER_PREFIX}encoder.") for name in wanted}
        return store.renamed({name: key for name, key in keys.items() if key in store.shapes}), frozenset()
    found = next((key for key in store.shapes if key.endswith(PATCHES)), None)
    if found is None:
        raise ValueError(f"--vit_path {store.name}: has no {PATCHES}; it is no SigLIP vision tower")
    prefix = found.removesuffix(PATCHES)
    keys = {name: prefix + name.removeprefix(TOWER_PREFIX) for name in wanted}
    return store.renamed(
        {name: key for name, key in keys.items() if key in store.shapes}, _linear_patches
    ), frozenset()


def _linear_patches(name: str, tensor: Tensor) -> Tensor:
    return linear_patch_embedding(tensor) if name.endswith(PATCHES) and tensor.ndim == 4 else tensor


def _open(path: Path, flag: str) -> Weights:
    file = find_weights(path, "model")
    if file is None:
        raise ValueError(
            f"{flag} {path}: has no model.safetensors and no index of shards; if it has a pytorch_model.bin, save it again with "
            "save_pretrained, which writes safetensors"
        )
    return _open_file(file, flag)


def _open_file(file: Path, flag: str) -> Weights:
    try:
        return open_weights(file)
    except ValueError as e:
        raise ValueError(f"{flag} {e}") from e


def _read(file: Path, flag: str, what: str) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(f"{flag} {file}: cannot be read ({e}); name a directory with {what}") from e


def _require_usual(file: Path, flag: str, values: Mapping[str, tuple[Any, Any]]) -> None:
    for key, (given, usual) in values.items():
        if given != usual:
            raise ValueError(f"{flag} {file}: {key} is {given!r}; the model here has {usual!r} only")
