"""The tokenizer file of a model directory and the tokens with a fixed role."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from tokenizers import Tokenizer as BpeTokenizer
from torch import Tensor

BEGIN, END = "<|im_start|>", "<|im_end|>"
IMAGE_START, IMAGE_END = "<|vision_start|>", "<|vision_end|>"
ANCHORS = {"box": "<BOX>", "mask": "<SEG>"}
"""Perception head -> the token whose hidden state it reads."""
PICTURE_HEADS = ("detr",)
"""Perception heads that read their picture's closing token: they look for things without being told by a token."""

SPECIAL_TOKENS = (BEGIN, END, IMAGE_START, IMAGE_END, *ANCHORS.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class SpecialTokens:
    """Ids of the tokens with a role. `anchors` maps the heads whose token the vocabulary has."""

    begin: int
    end: int
    image_start: int
    image_end: int
    anchors: Mapping[str, int]


class Tokenizer:
    """A `tokenizer.json` (byte-level BPE with Qwen2's special tokens).

    Args:
        path: the file, or the directory that holds it.

    Raises:
        ValueError: if the file is missing or lacks one of the four framing tokens.
    """

    def __init__(self, path: str | Path):
        file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise ValueError(
                f"{file}: no tokenizer here; --model_path must name a directory with a tokenizer.json"
            )
        self._bpe = BpeTokenizer.from_file(str(file))
        found = {name: self._bpe.token_to_id(name) for name in SPECIAL_TOKENS}
        ids = {name: i for name, i in found.items() if i is not None}
        missing = [n for n in (BEGIN, END, IMAGE_START, IMAGE_END) if n not in ids]
        if missing:
            raise ValueError(f"{file}: the vocabulary lacks {', '.join(missing)}; use a Qwen2 tokenizer")
        anchors = {head: ids[token] for head, token in ANCHORS.items() if token in ids}
        self.special = SpecialTokens(
            begin=ids[BEGIN],
            end=ids[END],
            image_start=ids[IMAGE_START],
            image_end=ids[IMAGE_END],
            anchors=anchors,
        )
        self.path = file
        # Data sets ask the same questions over and over.
        self._encode = lru_cache(maxsize=1 << 14)(
            lambda text: tuple(self._bpe.encode(text, add_special_tokens=False).ids)
        )

    def __len__(self) -> int:
        return self._bpe.get_vocab_size(with_added_tokens=True)

    def __reduce__(self):
        return type(self), (str(self.path),)  # data workers read the file again

    def encode(self, text: str) -> Tensor:
        """`t` int64; special tokens written in the text become their ids."""
        return torch.tensor(self._encode(text), dtype=torch.int64)

    def decode(self, ids: Tensor | list[int], *, keep_special: bool = False) -> str:
        return self._bpe.decode([int(i) for i in ids], skip_special_tokens=not keep_special)
