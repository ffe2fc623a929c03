"""What the recipes for one card are predicted to take: the table of docs/engine.md.

    python benchmarks/recipe_memory.py

Sizes alone, no weights: `train/memory.py` counts what stays, `train/activations.py` the highest moment of a step on a pack as
full as the recipe lets it be, half of it drawn pictures, a quarter seen ones, a quarter text to be learned. What no tensor is
(the driver's context, kernels, what the allocator cannot use; `train/plan.py`) comes on top: about 1.5 GiB. Ends with 1 if a
recipe does not fit its card.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from modeling.autoencoder import AutoEncoderConfig
from modeling.bagel.config import BagelConfig
from modeling.bagel.flops import PackShape
from modeling.build import build_model
from modeling.qwen2.config import Qwen2Config
from train.activations import predict_peak
from train.config import build_args, read_run_file
from train.memory import state_bytes
from train.param_manager import freeze
from train.synthetic import SHAPES

GB = 10**9
OUTSIDE_GB = 1.5 * 2**30 / GB


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """A recipe's card, the model that it is for, and the side of a pack's pictures in pixels."""

    gigabytes: int
    model: str
    side: int


CARDS = {
    "80gb": Card(gigabytes=80, model="BAGEL-7B-MoT", side=1024),
    "24gb": Card(gigabytes=24, model="BAGEL-7B-MoT", side=512),
    "16gb": Card(gigabytes=16, model="BAGEL-7B-MoT", side=256),
    "8gb": Card(gigabytes=8, model="around Qwen2.5-1.5B", side=256),
    "4gb": Card(gigabytes=4, model="around Qwen2.5-0.5B", side=128),
}
PUBLISHED = SHAPES["7b"].bagel
DECODERS = {
    "BAGEL-7B-MoT": PUBLISHED.llm,
    "around Qwen2.5-1.5B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "around Qwen2.5-0.5B": Qwen2Config(
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
}
"""The public configurations' sizes, with a second expert."""


def main() -> None:
    fits = True
    print(
        "| recipe | model | numbers | trained | weights | gradients, moments, average | peak of a step | tokens |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name, card in CARDS.items():
        args = build_args(read_run_file(ROOT / "configs" / "recipes" / f"{name}.yaml"))
        model = build_model(BagelConfig(llm=DECODERS[card.model], vit=PUBLISHED.vit))
        freeze(model, args.params, args.optim.lr)
        total = sum(p.numel() for p in model.parameters())
        kept, tokens = state_bytes(model, args), args.data.max_num_tokens
        peak = predict_peak(model, args, full_pack(tokens, card.side), AutoEncoderConfig()).total / GB
        changing = (kept.gradients + kept.moments + kept.averages) / GB
        print(
            f"| `{name}` | {card.model} | {total / GB:.1f} B | {kept.trained / 10**6:.1f} M ({kept.trained / total:.2%}) | "
            f"{kept.weights / GB:.1f} | {changing:.1f} | {peak:.1f} | {tokens:,} |"
        )
        fits = fits and peak + OUTSIDE_GB < card.gigabytes
    sys.exit(0 if fits else 1)


def full_pack(tokens: int, side: int) -> PackShape:
    """A pack of so many tokens with square pictures."""
    latents, patches = (side // 16) ** 2, (side // 14) ** 2
    drawn = max(1, tokens // 2 // latents)
    seen = max(1, tokens // 4 // patches)
    return PackShape(
        tokens=tokens,
        pairs=tokens**2 // 2,
        labels=tokens // 4,
        latents=drawn * latents,
        patches=seen * patches,
        patch_pairs=seen * patches**2,
        pictures=((side, side),) * drawn,
    )


if __name__ == "__main__":
    main()
