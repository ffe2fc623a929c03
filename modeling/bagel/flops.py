"""Floating-point operations that a training step of a pack needs: for the MFU, and to say beforehand how long a run takes.

Matrix products and the attention that is visible, a multiplication and an addition counting as two. Every part has its own number
of passes (`Passes`): forward, the gradient of what went in, the gradient of the weights. What is computed twice (recompute) or in
vain (padding) is not counted, nor are the perception heads, norms and activations; so the figure is on the low side.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.layout import visible_pairs
from data.types import PackedBatch
from modeling.autoencoder import AutoEncoderConfig
from modeling.bagel.config import BagelConfig

TRAINED, PASSED, FROZEN = 3, 2, 1
"""Forward and two products of its size in backward; without the weights' gradient; forward alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Passes:
    """How often each part's products are needed: `TRAINED`, `PASSED` or `FROZEN`.

    Attributes:
        und, gen: the trunk, for tokens of each expert.
        vocabulary: the output layer.
        flow: latents into and out of the trunk.
        vit, connector: of the vision side.
    """

    und: int = TRAINED
    gen: int = TRAINED
    vocabulary: int = TRAINED
    flow: int = TRAINED
    vit: int = TRAINED
    connector: int = TRAINED


@dataclass(frozen=True, slots=True, kw_only=True)
class PackShape:
    """The sizes of a pack that cost depends on.

    Attributes:
        tokens: all of them; `latents` of these go through the `gen` expert.
        pairs: (query, key) pairs that are visible.
        labels: tokens at which logits are made.
        patches, patch_pairs: of the vision tower; its pictures see themselves alone.
        pictures: height and width in pixels of what the autoencoder encodes.
        lengths, patch_lengths: tokens of every sample, patches of every picture of the tower.
        behind: by sample, the (query, key) pairs of its causal splits that have something before them; and how many tokens its
            splits have before them, added up.
    """

    tokens: int
    pairs: int
    labels: int
    latents: int
    patches: int
    patch_pairs: int
    pictures: tuple[tuple[int, int], ...] = ()
    lengths: tuple[int, ...] = ()
    patch_lengths: tuple[int, ...] = ()
    behind: tuple[tuple[int, int], ...] = ()

    @staticmethod
    def of(batch: PackedBatch) -> "PackShape":
        """The sizes of a pack."""
        return PackShape(
            tokens=batch.num_tokens,
            pairs=visible_pairs(batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches),
            labels=len(batch.label_ids),
            latents=len(batch.gen_index),
            patches=len(batch.und_index),
            patch_pairs=sum((h * w) ** 2 for h, w in batch.und_hw.tolist()),
            pictures=tuple((int(p.shape[1]), int(p.shape[2])) for p in batch.gen_pixels),
            lengths=tuple(batch.sample_lens),
            patch_lengths=tuple(h * w for h, w in batch.und_hw.tolist()),
            behind=tuple(_behind(batch)),
        )


def _behind(batch: PackedBatch) -> Iterator[tuple[int, int]]:
    splits = zip(batch.split_lens, batch.split_modes, batch.split_branches, strict=True)
    for length in batch.sample_lens:
        before: dict[int, int] = {}
        taken = pairs = context = 0
        while taken < length:
            split, mode, branch = next(splits)
            past = before.get(0, 0) + (before.get(branch, 0) if branch else 0)
            pairs += split * (past + split) if mode == "causal" and past else 0
            context += past
            before[branch] = before.get(branch, 0) + split * (mode != "noise")
            taken += split
        yield pairs, context


def step_flops(
    config: BagelConfig,
    shape: PackShape,
    passes: Passes = Passes(),  # noqa: B008 - frozen
    autoencoder: AutoEncoderConfig | None = None,
) -> float:
    """Operations of forward and backward over one pack.

    Args:
        config: sizes of the model.
        shape: of the pack; every token goes through one expert, logits are made at labels only.
        passes: what is trained.
        autoencoder: sizes of the frozen autoencoder that encodes `shape.pictures`; None: the latents are there.
    """
    llm, vit = config.llm, config.vit
    width, kv = llm.hidden_size, llm.num_key_value_heads * llm.head_dim
    layer = 3 * width * llm.intermediate_size + 2 * width * width + 2 * width * kv
    und = (shape.tokens - shape.latents) * llm.num_hidden_layers * layer
    gen = shape.latents * llm.num_hidden_layers * layer
    # Products of activations have no weights: forward is half of what their backward is.
    attention = TRAINED * llm.num_hidden_layers * 2 * width * shape.pairs
    head = width * llm.vocab_size * shape.labels
    # Into and out of the trunk, and the timestep's two layers.
    latent = shape.latents * (2 * config.latent_token_width * width + 256 * width + width * width)

    block = 4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size
    tower = vit.num_hidden_layers * (block * shape.patches + 2 * vit.hidden_size * shape.patch_pairs)
    tower += shape.patches * vit.hidden_size * 3 * vit.patch_size**2
    connector = shape.patches * (vit.hidden_size * width + width * width)
    encoded = 0.0 if autoencoder is None else encode_flops(autoencoder, shape.pictures)
    return encoded + 2.0 * (
        passes.und * und
        + passes.gen * gen
        + attention
        + passes.vocabulary * head
        + passes.flow * latent
        + passes.vit * tower
        + passes.connector * connector
    )


def encode_flops(config: AutoEncoderConfig, pictures: Sequence[tuple[int, int]]) -> float:
    """Operations of the autoencoder's encoder, forward, over pictures of some heights and widths in pixels."""
    return float(sum(_encode_one(config, height, width) for height, width in pictures))


def _encode_one(config: AutoEncoderConfig, height: int, width: int) -> int:
    def residual(width_in: int, width_out: int) -> int:
        shortcut = width_in * width_out * (width_in != width_out)
        return 9 * width_in * width_out + 9 * width_out**2 + shortcut

    pixels = height * width
    total = pixels * 9 * config.in_channels * config.ch
    before = config.ch
    for level, channels in enumerate(config.widths):
        blocks = residual(before, channels) + (config.num_res_blocks - 1) * residual(channels, channels)
        total += pixels * blocks
        before = channels
        if level + 1 < len(config.widths):
            height, width = height // 2, width // 2
            pixels = height * width
            total += pixels * 9 * channels**2
    attention = pixels * 4 * before**2 + 2 * pixels**2 * before
    total += pixels * 2 * residual(before, before) + attention + pixels * 9 * before * 2 * config.z_channels
    return 2 * total
