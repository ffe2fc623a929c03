"""A tokenizer without merges: one token per byte, and the special tokens."""

from collections.abc import Callable

import pytest
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BpeTokenizer

from data.tokens import SPECIAL_TOKENS, Tokenizer


@pytest.fixture(scope="session")
def save_tokenizer(tmp_path_factory) -> Callable[[tuple[str, ...]], Tokenizer]:
    """Makes a tokenizer with the given special tokens."""

    def save(special: tuple[str, ...]) -> Tokenizer:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        bpe = BpeTokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        bpe.add_special_tokens([AddedToken(token, special=True) for token in special])
        path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
        bpe.save(str(path))
        return Tokenizer(path)

    return save


@pytest.fixture(scope="session")
def tokenizer(save_tokenizer) -> Tokenizer:
    return save_tokenizer(SPECIAL_TOKENS)
