"""Decoder and vision tower against transformers, with random weights: an independent implementation that is always there.

Relative errors below 1e-5. Worst errors measured: decoder 3.3e-7, vision tower 1.4e-7.
"""

import pytest
import torch
from einops import rearrange
from torch import Tensor, nn

from data.layout import LayoutSpec
from data.packing import pack
from data.tokens import SpecialTokens
from data.types import Sample, Segment
from modeling.ops.attention import AttentionPlan, packed_attention
from modeling.ops.patch import normalise_pixels
from modeling.qwen2.config import Qwen2Config
from modeling.qwen2.model import Qwen2ForCausalLM
from modeling.qwen2.mot import Routing, Rows, filled
from modeling.siglip.config import SiglipConfig
from modeling.siglip.model import SiglipVisionModel

TOLERANCE = 1e-5
SPECIAL = SpecialTokens(begin=1, end=2, image_start=3, image_end=4, anchors={})
SPEC = LayoutSpec(vit_patch_size=8, vit_positions_per_side=6)

TEXTS = ((5,), (30, 9), (70, 1, 40), (900,))
"""Tokens of each text of each sample; the last sample is long enough to attend split by split."""


def error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


def randomise(model: nn.Module) -> None:
    """Norms and biases too, so that no term can vanish unnoticed."""
    torch.manual_seed(0)
    for name, p in model.requires_grad_(False).named_parameters():
        p.normal_(std=0.2 if p.ndim == 1 else p.shape[1] ** -0.5 if "embed" not in name else 1.0)


def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(1)
    return [
        Sample(
            segments=tuple(
                Segment(kind="text", ids=torch.randint(5, 96, (n,), generator=generator)) for n in lens
            )
        )
        for lens in TEXTS
    ]


def decode(model: Qwen2ForCausalLM, packed: list[Sample]) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, last states and logits of a pack of texts."""
    batch = pack(packed, SPEC, SPECIAL)
    plan = AttentionPlan.build(
        batch.sample_lens, batch.split_lens, batch.split_modes, batch.split_branches, torch.device("cpu")
    )
    text = model.model.embed_tokens(batch.text_ids)
    stream = model.model(
        Rows(filled(text), text[:0]),
        Routing.build(batch.gen_index, batch.num_tokens),
        batch.position,
        lambda layer, q, k, v: packed_attention(q, k, v, plan),
    )
    hidden = model.model.finish(stream).und[: len(text)]
    return batch.text_ids, hidden, model.lm_head(hidden)


@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_on_packs_of_text(tied: bool) -> None:
    from transformers import Qwen2Config as TheirConfig
    from transformers import Qwen2ForCausalLM as TheirModel

    sizes = {
        "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "rms_norm_eps": 1e-5, "tie_word_embeddings": tied,
    }  # fmt: skip
    ours = Qwen2ForCausalLM(
        Qwen2Config(layer_module="Qwen2DecoderLayer", qk_norm=False, rope_theta=5e4, **sizes)
    )
    randomise(ours)
    rope = {"rope_type": "default", "rope_theta": 5e4}
    theirs = TheirModel(TheirConfig(rope_parameters=rope, attn_implementation="eager", **sizes)).eval()
    theirs.load_state_dict(ours.state_dict())

    with torch.no_grad():
        ids, hidden, logits = decode(ours, samples())
        lens = [
            sum(lens) + 2 * len(lens) for lens in TEXTS
        ]  # every text begins and ends with a token of its own
        for sample, *packed in zip(samples(), *(x.split(lens) for x in (ids, hidden, logits)), strict=True):
            alone = decode(ours, [sample])
            assert torch.equal(packed[0], alone[0])
            expected = theirs(alone[0][None], output_hidden_states=True)
            for got in (packed, alone):
                assert error(got[1], expected.hidden_states[-1][0]) < TOLERANCE
                assert error(got[2], expected.logits[0]) < TOLERANCE


def test_the_vision_tower_on_packs_of_square_pictures() -> None:
    from transformers import SiglipVisionConfig as TheirConfig
    from transformers import SiglipVisionModel as TheirModel

    sizes = {
        "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3, "num_attention_heads": 4, "patch_size": 8,
        "image_size": 48,
    }  # fmt: skip
    theirs = TheirModel(TheirConfig(attn_implementation="eager", **sizes)).eval()
    randomise(theirs)
    ours = SiglipVisionModel(SiglipConfig(**sizes))
    weights = {f"vision_model.{k}": v for k, v in theirs.state_dict().items() if not k.startswith("head.")}
    embedding = "vision_model.embeddings.patch_embedding.weight"
    weights[embedding] = rearrange(
        weights[embedding], "d c p q -> d (p q c)"
    )  # a convolution as a linear layer
    ours.load_state_dict(weights)

    generator = torch.Generator().manual_seed(1)
    pictures = [torch.randint(0, 256, (3, 48, 48), dtype=torch.uint8, generator=generator) for _ in range(3)]
    batch = pack([Sample(segments=(Segment(kind="und_image", pixels=p),)) for p in pictures], SPEC, SPECIAL)
    lens = [36] * len(pictures)
    plan = AttentionPlan.build(lens, lens, ["full"] * len(lens), [0] * len(lens), torch.device("cpu"))
    with torch.no_grad():
        seen = ours(normalise_pixels(batch.und_patches), batch.und_position, ((6, 6),) * len(lens), plan)
        expected = theirs(normalise_pixels(torch.stack(pictures))).last_hidden_state
    assert error(seen, expected.flatten(0, 1)) < TOLERANCE
