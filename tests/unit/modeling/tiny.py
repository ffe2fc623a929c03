"""A tiny model and tiny samples of every kind, for tests."""

from dataclasses import fields, is_dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from data.layout import LayoutSpec
from data.tokens import SpecialTokens
from data.types import PackedBatch, Region, Sample, Segment
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.decode import Decoder
from modeling.bagel.init import initial_value
from modeling.ops.flow import interpolate_path, seeded_noise
from modeling.qwen2.config import Qwen2Config
from modeling.siglip.config import SiglipConfig
from modeling.types import FlowState

SPECIAL = SpecialTokens(begin=1, end=2, image_start=3, image_end=4, anchors={"box": 5, "mask": 6})
SPEC = LayoutSpec(vit_patch_size=8, vit_positions_per_side=8, latent_stride=16, latent_positions_per_side=4)
LATENT_WIDTH = 64
SMALL_DECODER = {"hidden_size": 32, "num_attention_heads": 2, "mlp_dim": 32, "iou_head_hidden_dim": 16}
SMALL_ENCODER = {
    "hidden_size": 16, "output_channels": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 32,
    "patch_size": 8, "window_size": 2, "global_attn_indexes": [1],
}  # fmt: skip
SMALL_CODES = {"resolution": 32, "width": 8, "down": [1, 1, 1, 1], "up": [1, 1, 1, 1], "code": 16}
MASK_HEADS = {
    "mask": {"channels": 8},
    "sam": {"type": "sam", "decoder": SMALL_DECODER, "fine_channels": 8},
    "separate": {
        "type": "sam",
        "vision_sharing": "separate",
        "decoder": SMALL_DECODER,
        "encoder": SMALL_ENCODER,
    },
    "autoencoder": {"type": "autoencoder", "autoencoder": SMALL_CODES, "width": 32},
}
"""Small mask heads of every sort, by a name of their own."""
TINY_DETR = {
    "width": 16, "num_heads": 2, "num_layers": 2, "feed_forward": 32, "num_queries": 5, "caption_layers": 1,
}  # fmt: skip


def tiny_config(head_reads: str = "self", **llm) -> BagelConfig:
    """Sizes that run in milliseconds; grouped queries, every head."""
    sizes = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return BagelConfig(
        llm=Qwen2Config(**{**sizes, **llm}),
        vit=SiglipConfig(
            hidden_size=24,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            patch_size=8,
            image_size=64,
        ),
        max_latent_size=4,
        vit_max_num_patch_per_side=8,
        heads={"box": {"width": 16}, "mask": {"channels": 8}, "detr": TINY_DETR},
        head_reads=head_reads,  # type: ignore[arg-type]
    )


def mask_config(kind: str, head_reads: str = "self") -> BagelConfig:
    """`tiny_config` with a mask head of MASK_HEADS."""
    config = tiny_config(head_reads)
    return replace(config, heads={**config.heads, "mask": MASK_HEADS[kind]})


def tiny_model(config: BagelConfig | None = None, seed: int = 0) -> Bagel:
    """Random everywhere, also where a fresh model has zeros, so that no term can vanish unnoticed."""
    model = Bagel(config or tiny_config())
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(initial_value(name, p.shape, model.config, seed))
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def picture(seed: int, height: int = 64, width: int = 64) -> Tensor:
    return torch.randint(
        0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def text(*ids: int, **rest) -> Segment:
    return Segment(kind="text", ids=torch.tensor(ids), **rest)


def numbers(output: Any) -> Tensor:
    """All floating point numbers of a head's output, one after the other."""
    if isinstance(output, Tensor):
        return output.flatten() if output.is_floating_point() else torch.zeros(0)
    parts = [getattr(output, f.name) for f in fields(output)] if is_dataclass(output) else output
    found = [numbers(x) for x in parts if isinstance(x, (Tensor, tuple))]
    return torch.cat([torch.zeros(0), *found])


def perception_sample() -> Sample:
    """A picture, a question, an answer with a box and a mask."""
    mask = (picture(9)[0] > 127).to(torch.uint8)
    return Sample(
        segments=(
            Segment(kind="und_image", pixels=picture(1)),
            text(10, 11),
            text(5, 12, 6, supervised=True),
        ),
        regions=(
            Region(head="box", segment=2, token=0, image=0, boxes=torch.tensor([[0.1, 0.2, 0.5, 0.6]])),
            Region(head="mask", segment=2, token=2, image=0, mask=mask),
        ),
    )


def detection_sample() -> Sample:
    """An instruction, a picture with two named objects, what is said of it."""
    boxes = torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.5, 0.1, 0.9, 0.4]])
    phrases = (torch.tensor([30, 31, 2]), torch.tensor([32, 2]))
    return Sample(
        segments=(
            text(10, 11),
            Segment(kind="und_image", pixels=picture(7)),
            text(15, 16, supervised=True),
        ),
        regions=(Region(head="detr", segment=1, token=0, image=1, boxes=boxes, phrases=phrases),),
    )


def drawing_sample() -> Sample:
    """Text to image."""
    return Sample(
        segments=(text(10, 11, 12), Segment(kind="gen_image", pixels=picture(2), timestep=0.3, noise_seed=1))
    )


def editing_sample() -> Sample:
    """A picture in both roles, an instruction, the edited picture, then the answer text; not square."""
    return Sample(
        segments=(
            Segment(kind="cond_image", pixels=picture(3, 32, 64), noise_seed=5),
            Segment(kind="und_image", pixels=picture(3, 32, 64)),
            text(20, 21),
            Segment(kind="gen_image", pixels=picture(4, 32, 64), timestep=0.7, noise_seed=2),
            text(9, 8, supervised=True),
        )
    )


def text_sample() -> Sample:
    return Sample(segments=(text(10, 11, 12), text(13, 14, supervised=True)))


def demonstrated_sample() -> Sample:
    """A question answered by a demonstration, and again."""
    answers = (text(25, 26, supervised=True, role="teacher"), text(27, supervised=True, role="student"))
    return Sample(segments=(text(10, 11), answers[0], text(12), answers[1]))


def every_sample() -> list[Sample]:
    return [
        demonstrated_sample(),
        perception_sample(),
        detection_sample(),
        drawing_sample(),
        editing_sample(),
        text_sample(),
    ]


def made_up_latents(batch: PackedBatch) -> FlowState:
    """Latents that depend on each image's seed only, in place of a VAE."""
    shapes = [(int(h * w), LATENT_WIDTH) for h, w in batch.gen_hw.tolist()]
    seeds = batch.gen_seed.tolist()
    nothing = torch.zeros(0, LATENT_WIDTH)
    z = torch.cat(
        [nothing, *(seeded_noise(s + 100, n, nothing.device) for s, n in zip(seeds, shapes, strict=True))]
    )
    e = torch.cat(
        [nothing, *(seeded_noise(s, n, nothing.device) for s, n in zip(seeds, shapes, strict=True))]
    )
    return FlowState(latents=z, noise=e, noised=interpolate_path(z, e, batch.gen_timestep))


def tiny_decoder(head_reads: str = "self", **llm) -> Decoder:
    """A decoder whose VAE is replaced by latents made up from each image's seed, and pictures made of the first channels."""
    vae = SimpleNamespace(decode=lambda z: z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3))

    def encoder(batch: PackedBatch) -> FlowState:
        return made_up_latents(batch)

    encoder.vae, encoder.patch = vae, 2  # type: ignore[attr-defined]
    return Decoder(tiny_model(tiny_config(head_reads, **llm)).eval(), encoder, SPEC, SPECIAL)  # type: ignore[arg-type]
