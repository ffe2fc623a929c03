"""A Hugging Face SAM directory (`config.json`, `model.safetensors`) as a mask head's options and weights.

`SamModel` loads unchanged. Of `Sam2Model` the mask decoder fits, with the code of places; its image encoder is another.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from modeling.sam.config import SamDecoderConfig, SamVisionConfig
from modeling.weights import Weights, find_weights, open_weights

CODE = "shared_image_embedding.positional_embedding"
SAME_CODE = "prompt_encoder.shared_embedding.positional_embedding"
SAM2_NAMES = {".o_proj.": ".out_proj.", ".mlp.proj_in.": ".mlp.lin1.", ".mlp.proj_out.": ".mlp.lin2."}
"""What Hugging Face calls otherwise in SAM 2's two-way transformer."""


def sam_options(path: Path, *, separate: bool) -> dict[str, Any]:
    """Sizes that a directory's `config.json` says: `decoder`, `mask_channels` and, if it is used, `encoder`.

    Raises:
        ValueError: if it is no SAM, or its image encoder is wanted and is not SAM's.
    """
    file = path / "config.json"
    try:
        values = dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(
            f"--mask_path {file}: cannot be read ({e}); name a Hugging Face SAM directory"
        ) from e
    kind = values.get("model_type")
    if kind not in ("sam", "sam2", "sam2_video"):
        raise ValueError(f"--mask_path {file}: model_type is {kind!r}; only sam and sam2 can be read")
    decoder = SamDecoderConfig.from_json(_part(values, "mask_decoder_config"), str(file))
    if kind != "sam":
        if separate:
            raise ValueError(
                f"--mask_path {file}: SAM 2's image encoder is not built; take vision_sharing vlm, or a SAM directory"
            )
        eps = _part(values, "mask_decoder_config").get("layer_norm_eps", 1e-5)
        decoder = replace(decoder, iou_sigmoid=True, object_score=True, layer_norm_eps=eps)
    found: dict[str, Any] = {"decoder": asdict(decoder)}
    prompts = _part(values, "prompt_encoder_config")
    found["mask_channels"] = prompts.get("mask_input_channels", 16)
    if separate:
        vision = SamVisionConfig.from_json(_part(values, "vision_config"), str(file))
        found["encoder"] = {**asdict(vision), "global_attn_indexes": list(vision.global_attn_indexes)}
    return found


def sam_weights(path: Path) -> Weights:
    """The directory's tensors under the names of `SamMaskHead`'s parts, each once.

    Raises:
        ValueError: if there are none, or the two copies of the code of places differ.
    """
    file = find_weights(path, "model")
    if file is None:
        raise ValueError(
            f"--mask_path {path}: has no model.safetensors; save the model with save_pretrained, which writes it"
        )
    store = open_weights(file)
    if CODE in store.shapes and SAME_CODE in store.shapes:
        if not torch.equal(store.read(CODE), store.read(SAME_CODE)):
            raise ValueError(f"--mask_path {file}: {CODE} and {SAME_CODE} differ; they are one tensor in SAM")
        store = replace(store, shapes={k: shape for k, shape in store.shapes.items() if k != SAME_CODE})
    keys = {CODE: SAME_CODE} if CODE not in store.shapes and SAME_CODE in store.shapes else {}
    for key in store.shapes:
        new = key
        for theirs, ours in SAM2_NAMES.items():
            new = new.replace(theirs, ours) if key.startswith("mask_decoder.transformer.") else new
        if new != key:
            keys[new] = key
    return store.renamed(keys)


def _part(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    found = values.get(key) or {}
    return dict(found) if isinstance(found, dict) else {}
