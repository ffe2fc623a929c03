"""Parameter groups: every published key has one, flags freeze and pace them, a stray is named."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from train.args import ParamArgs
from train.param_manager import (
    describe,
    freeze,
    frozen_stay,
    group_of,
    keep_frozen_in,
    lr_scale,
    optimizer_groups,
    require_reached,
)

NAMES = {
    "language_model.model.embed_tokens.weight": "embeddings",
    "language_model.lm_head.weight": "embeddings",
    "language_model.model.layers.0.self_attn.q_proj.weight": "llm_und",
    "language_model.model.layers.0.self_attn.q_proj_moe_gen.bias": "llm_gen",
    "language_model.model.layers.0.mlp_moe_gen.gate_proj.weight": "llm_gen",
    "language_model.model.layers.0.input_layernorm_moe_gen.weight": "llm_gen",
    "language_model.model.norm.weight": "llm_und",
    "language_model.model.norm_moe_gen.weight": "llm_gen",
    "vit_model.vision_model.encoder.layers.0.mlp.fc1.weight": "vit",
    "connector.fc1.weight": "connector",
    "time_embedder.mlp.0.weight": "flow",
    "vae2llm.weight": "flow",
    "llm2vae.bias": "flow",
    "heads.box.out.weight": "box",
    "heads.mask.out.weight": "mask",
    "language_model.model.layers.0.self_attn.q_proj_moe_gen.lora_A.default.weight": "lora",
    "vit_model.vision_model.encoder.layers.0.mlp.fc1.lora_B.default.weight": "lora",
    "latent_pos_embed.pos_embed": None,
}
OF_SOME_HEADS = {
    "heads.mask.vision_encoder.layers.0.attn.qkv.weight": "mask_encoder",
    "heads.mask.autoencoder.linear_dec.weight": "mask_encoder",
    "heads.detr.adapters.grid.up.weight": "detr_adapter",
    "heads.detr.box.0.weight": "detr",
}


class Named(nn.Module):
    """A model with parameters of these names, one number each."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            is_table = leaf == "pos_embed"
            module.register_parameter(leaf, nn.Parameter(torch.zeros(1), requires_grad=not is_table))


@pytest.fixture
def model() -> Named:
    return Named(list(NAMES))


def trained(model: nn.Module) -> set[str | None]:
    return {group_of(name) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(("name", "group"), {**NAMES, **OF_SOME_HEADS}.items())
def test_names(name: str, group: str | None) -> None:
    assert group_of(name) == group


@pytest.mark.parametrize(
    ("flag", "frozen"),
    [
        ("freeze_llm", {"embeddings", "llm_und", "llm_gen"}),
        ("freeze_embeddings", {"embeddings"}),
        ("freeze_mot_und", {"llm_und"}),
        ("freeze_mot_gen", {"llm_gen"}),
        ("freeze_vit", {"vit"}),
        ("freeze_connector", {"connector"}),
        ("freeze_flow", {"flow"}),
        ("freeze_box", {"box"}),
        ("freeze_mask", {"mask"}),
    ],
)
def test_freezing(model: Named, flag: str, frozen: set[str]) -> None:
    freeze(model, ParamArgs(**{flag: True}))
    assert trained(model) == {*NAMES.values()} - {None} - frozen


def test_what_the_mask_head_starts_from_is_kept_unless_asked() -> None:
    names = ["heads.mask.vision_encoder.pos_embed.weight", "heads.mask.out.weight"]
    for flags, groups in (
        ({}, {"mask"}),
        ({"freeze_mask_encoder": False}, {"mask", "mask_encoder"}),
        ({"freeze_mask_encoder": False, "mask_encoder_lr": 0.0}, {"mask"}),
    ):
        model = Named(names)
        freeze(model, ParamArgs(**flags))  # type: ignore[arg-type]
        assert trained(model) == groups


def test_rates(model: Named) -> None:
    args = ParamArgs(freeze_vit=True, llm_lr=2.0, mot_gen_lr=3.0, embeddings_lr=0.5, lora_lr=4.0, box_lr=0.0)
    freeze(model, args)
    rates = {group["name"]: group["peak_lr"] for group in optimizer_groups(model, args, 1.0)}
    assert rates == {
        "lora": 4.0, "embeddings": 0.5, "llm_gen": 3.0, "llm_und": 2.0, "connector": 1.0, "flow": 1.0, "mask": 1.0,
    }  # fmt: skip
    table = describe(model, args, 1.0).splitlines()
    assert "vit                            1  frozen (--freeze_vit)" in table
    assert "box                            1  frozen (a learning rate of 0)" in table
    assert table[-1] == "trained                       15  of 18 (83.33%)"


def test_a_rate_of_0_freezes(model: Named) -> None:
    freeze(model, ParamArgs(llm_lr=1.0, mot_und_lr=0.0), lr=0.0)
    assert trained(model) == {"embeddings", "llm_gen"}


def test_norms_biases_and_embeddings_may_be_spared_decay() -> None:
    model = Named(
        ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight", "connector.bias"]
    )
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        model.get_parameter(name).data = torch.zeros(2, 2)
    published = optimizer_groups(model, ParamArgs(), 1.0)
    assert [(g["name"], g.get("weight_decay", "all"), len(g["params"])) for g in published] == [  # type: ignore[arg-type]
        ("embeddings", "all", 2),
        ("connector", "all", 1),
    ]
    asked = optimizer_groups(model, ParamArgs(no_decay_norm_bias=True), 1.0)
    assert [(g["name"], g.get("weight_decay", "all"), len(g["params"])) for g in asked] == [  # type: ignore[arg-type]
        ("embeddings", "all", 1),
        ("embeddings", 0.0, 1),
        ("connector", 0.0, 1),
    ]


def test_rates_grow_with_the_step_if_asked(model: Named) -> None:
    assert lr_scale(ParamArgs(lr_reference_batch_size=10), 40) == 1.0
    args = ParamArgs(auto_scale_lr=True, lr_reference_batch_size=10)
    assert lr_scale(args, 40) == 4.0
    assert lr_scale(replace(args, lr_scale_rule="sqrt", packed_lr_factor=0.945), 40) == pytest.approx(1.89)
    with pytest.raises(ValueError, match=r"--auto_scale_lr needs --lr_reference_batch_size.*now 40"):
        lr_scale(ParamArgs(auto_scale_lr=True), 40)
    assert {g["peak_lr"] for g in optimizer_groups(model, args, 0.5, 4.0)} == {2.0}
    assert "vit                            1  0.5 -> 2" in describe(model, args, 0.5, 4.0).splitlines()


def test_with_adapters_nothing_else_is_trained_but_what_is_named(model: Named) -> None:
    freeze(model, ParamArgs(lora_enable=True, lora_modules_to_save="box, mask", freeze_mask=True))
    assert trained(model) == {"lora", "box"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_enable": True, "lora_modules_to_save": "boxes"}, "--lora_modules_to_save boxes: is no group"),
        ({"lora_modules_to_save": "box"}, "--lora_modules_to_save box: is for --lora_enable True"),
    ],
)
def test_groups_that_are_none_are_named(model: Named, flags: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        freeze(model, ParamArgs(**flags))


def test_an_adapter_in_what_is_frozen_is_refused() -> None:
    adapted = ["language_model.model.layers.0.self_attn.q_proj.weight"]
    require_reached(ParamArgs(freeze_mot_gen=True, freeze_vit=True), adapted)
    for flag in ("freeze_llm", "freeze_mot_und", "freeze_und"):
        with pytest.raises(ValueError, match=f"--{flag} True: keeps {adapted[0]}"):
            require_reached(ParamArgs(**{flag: True}), adapted)


def test_frozen_weights_may_lie_in_fewer_bits(model: Named) -> None:
    freeze(model, ParamArgs(freeze_vit=True))
    keep_frozen_in(model, torch.bfloat16)
    kept = {group_of(n) for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert kept == {"vit", None}


def test_every_trainable_parameter_is_in_one_group(model: Named) -> None:
    groups = optimizer_groups(model, ParamArgs(), 1.0)
    assert sum(len(group["params"]) for group in groups) == len(NAMES) - 1  # type: ignore[arg-type]


def test_a_stray_is_named() -> None:
    for use in (lambda m: freeze(m, ParamArgs()), lambda m: optimizer_groups(m, ParamArgs(), 1.0)):
        with pytest.raises(ValueError, match=r"parameter heads\.depth\.out\.weight .* belongs to no group"):
            use(Named(["connector.fc1.weight", "heads.depth.out.weight"]))


def test_nothing_left_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing is left to train"):
        freeze(Named(["connector.fc1.weight"]), ParamArgs(freeze_connector=True))


def test_what_is_frozen_is_checked_bit_for_bit(model: Named) -> None:
    freeze(model, ParamArgs(freeze_vit=True))
    vit, flow = (
        model.get_parameter("vit_model.vision_model.encoder.layers.0.mlp.fc1.weight"),
        model.get_parameter("llm2vae.bias"),
    )
    with torch.no_grad():
        with frozen_stay(model, check=True):
            flow.add_(1.0)
        with pytest.raises(AssertionError, match="1 frozen parameters changed, first vit_model"):
            with frozen_stay(model, check=True):
                vit.add_(-0.0).neg_()  # -0.0 equals 0.0, and has other bytes
        with frozen_stay(model, check=False):
            vit.add_(1.0)
