"""Make the quickstart's starting model directory: a tokenizer and the JSON configurations, no weights.

In: the training texts of `make_quickstart.py`. Out, under `--output_dir`: `tokenizer.json` (byte-level BPE with Qwen2's split
rule and special tokens), `llm_config.json`, `vit_config.json`, `bagel_config.json`, `preprocessor_config.json`. The autoencoder
joins it by its own entry, `train/main_autoencoder.py`; the trainer starts from random weights where the directory has none.

    python scripts/data/make_quickstart_model.py --data_dir runs/quickstart/data --output_dir runs/quickstart/base
"""

import argparse
import json
import sys
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.tokens import SPECIAL_TOKENS

END_OF_TEXT = "<|endoftext|>"
QWEN2_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Qwen2's published `tokenizer.json` cuts a text before the merges: every digit alone, a word with the space before it."""

LLM: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "intermediate_size": 288,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "initializer_range": 0.1,
    "qk_norm": True,
    "layer_module": "Qwen2MoTDecoderLayer",
    "tie_word_embeddings": False,
}
VIT: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 288,
    "num_channels": 3,
    "image_size": 64,
    "patch_size": 8,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "rope": False,
    "stem_width": 64,
}
BAGEL: dict[str, Any] = {
    "latent_patch_size": 2,
    "max_latent_size": 4,
    "vit_max_num_patch_per_side": 8,
    "connector_act": "gelu_pytorch_tanh",
    "interpolate_pos": False,
    "head_reads": "self",
    "heads": {"box": {"width": 96}, "mask": {"width": 96, "channels": 16}},
}

PREPROCESSOR: dict[str, Any] = {
    "vit": {"max_image_size": 64, "min_image_size": 64, "stride": 8},
    "vae": {"max_image_size": 64, "min_image_size": 64, "stride": 16},
}
"""What pictures go through at inference; the transforms of configs/quickstart.yaml."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument(
        "--max_merges", type=int, default=400, help="fewer are made where the texts hold fewer words"
    )
    args = parser.parse_args(argv)
    if not (args.data_dir / "manifest.json").is_file():
        parser.error(f"{args.data_dir}: no manifest.json; run scripts/data/make_quickstart.py first")
    try:
        vocab_size = make(args.data_dir, args.output_dir, args.max_merges)
    except OSError as error:
        sys.exit(f"{error.filename or args.output_dir}: {error.strerror}; choose another --output_dir")
    print(f"{args.output_dir}: tokenizer with {vocab_size} entries, configurations")


def make(data_dir: Path, output_dir: Path, max_merges: int) -> int:
    """Write the model directory; returns the tokenizer's size."""
    tokenizer = train_tokenizer(training_texts(data_dir), max_merges)
    return write_model(output_dir, tokenizer, llm=LLM, vit=VIT, bagel=BAGEL, preprocessor=PREPROCESSOR)


def write_model(
    output_dir: Path,
    tokenizer: Tokenizer,
    *,
    llm: dict[str, Any],
    vit: dict[str, Any],
    bagel: dict[str, Any],
    preprocessor: dict[str, Any],
) -> int:
    """Write tokenizer and configurations, the decoder's with the vocabulary (in eights); returns the size of the tokenizer."""
    output_dir.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output_dir / "tokenizer.json"))
    size = tokenizer.get_vocab_size(with_added_tokens=True)
    ids = {"bos_token_id": END_OF_TEXT, "eos_token_id": SPECIAL_TOKENS[1]}
    vocabulary = {
        "vocab_size": -(-size // 8) * 8,
        **{key: tokenizer.token_to_id(token) for key, token in ids.items()},
    }
    configs = {
        "llm_config": {**llm, **vocabulary},
        "vit_config": vit,
        "bagel_config": bagel,
        "preprocessor_config": preprocessor,
    }
    for name, config in configs.items():
        (output_dir / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return size


def train_tokenizer(texts: Iterator[str], max_merges: int) -> Tokenizer:
    """A byte-level BPE: every byte, then merges of the texts' words, then the special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + max_merges, initial_alphabet=alphabet, min_frequency=2, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (END_OF_TEXT, *SPECIAL_TOKENS)])
    return tokenizer


def training_texts(data_dir: Path) -> Iterator[str]:
    """Every turn of the message rows, every question for a region and every caption of the training split."""
    for task in ("vqa", "edit", "text"):
        with (data_dir / f"{task}_train.jsonl").open() as lines:
            for line in lines:
                for turn in json.loads(line)["message"]:
                    yield turn["value"].replace("<image>", "").strip()
    for found in json.loads((data_dir / "refer_train.json").read_text())["annotations"]:
        for expression in found["expressions"]:
            yield f"Where is {expression}?"  # as `ReferDataset` asks unless its templates are changed
            yield f"Segment {expression}."
    for shard in sorted(data_dir.glob("t2i_train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    yield json.load(content)["caption"]


if __name__ == "__main__":
    main()
