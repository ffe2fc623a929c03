"""The files beside `tokenizer.json` that other programs want, made from it: Qwen2's older form of the same tokenizer."""

import json
from pathlib import Path
from typing import Any

from data.tokens import BEGIN, END

NAMES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
"""Everything that a tokenizer's directory may hold."""


def derived_files(tokenizer_json: Path) -> dict[str, str]:
    """`vocab.json`, `merges.txt` and `tokenizer_config.json` of a byte-level BPE, by name.

    Raises:
        ValueError: if it is another kind of tokenizer.
    """
    values: dict[str, Any] = json.loads(tokenizer_json.read_text(encoding="utf-8"))
    bpe = values["model"]
    if bpe.get("type", "BPE") != "BPE":
        raise ValueError(f"{tokenizer_json}: is a {bpe['type']} tokenizer; Qwen2's is a BPE")
    pairs = (pair if isinstance(pair, str) else " ".join(pair) for pair in bpe["merges"])
    return {
        "vocab.json": json.dumps(bpe["vocab"], ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *pairs]) + "\n",
        "tokenizer_config.json": json.dumps(_config(values["added_tokens"]), indent=2, ensure_ascii=False)
        + "\n",
    }


def _config(added: list[dict[str, Any]]) -> dict[str, Any]:
    special = [token["content"] for token in added if token["special"]]
    padding = [token for token in special if token not in (BEGIN, END)]
    keys = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    return {
        "add_prefix_space": False,
        "added_tokens_decoder": {str(token["id"]): {key: token[key] for key in keys} for token in added},
        "additional_special_tokens": special,
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "pad_token": padding[0] if padding else END,
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
