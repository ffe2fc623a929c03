"""What is trained, and how fast."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag
from train.args.fsdp import Dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamArgs:
    """Which parameters are trained, and how fast; a rate of 0 freezes as --freeze_x does. Groups: train/param_manager.py."""

    freeze_und: bool = flag(
        False,
        "Let no gradient pass the understanding tokens: their expert, the embeddings, the tower and the connector stay as they "
        "are, the output layer is trained.",
    )
    freeze_llm: bool = flag(
        False, "Keep the whole language model (both experts, embeddings, output layer) as it is."
    )
    freeze_mot_und: bool = flag(False, "Keep the understanding expert as it is.")
    freeze_mot_gen: bool = flag(False, "Keep the generation expert as it is.")
    freeze_embeddings: bool = flag(False, "Keep the embeddings and the output layer as they are.")
    freeze_vit: bool = flag(False, "Keep the understanding encoder as it is.")
    freeze_connector: bool = flag(False, "Keep the connector from encoder to language model as it is.")
    freeze_flow: bool = flag(
        False, "Keep the latents' input and output layers and the time embedder as they are."
    )
    freeze_box: bool = flag(False, "Keep the box head as it is.")
    freeze_mask: bool = flag(False, "Keep the mask head as it is.")
    freeze_mask_encoder: bool = flag(
        True,
        "Keep what the mask head has of pictures and masks alone: SAM's own image encoder, or the mask autoencoder.",
    )
    freeze_detr: bool = flag(False, "Keep the detector as it is.")
    llm_lr: float | None = flag(None, "Learning rate of the language model; None: --lr.", low=0)
    mot_und_lr: float | None = flag(None, "Learning rate of the understanding expert; None: --llm_lr.", low=0)
    mot_gen_lr: float | None = flag(None, "Learning rate of the generation expert; None: --llm_lr.", low=0)
    embeddings_lr: float | None = flag(
        None, "Learning rate of the embeddings and the output layer; None: --llm_lr.", low=0
    )
    vit_lr: float | None = flag(None, "Learning rate of the understanding encoder; None: --lr.", low=0)
    connector_lr: float | None = flag(None, "Learning rate of the connector; None: --lr.", low=0)
    flow_lr: float | None = flag(
        None, "Learning rate of the latents' layers and the time embedder; None: --lr.", low=0
    )
    box_lr: float | None = flag(None, "Learning rate of the box head; None: --lr.", low=0)
    mask_lr: float | None = flag(None, "Learning rate of the mask head; None: --lr.", low=0)
    mask_encoder_lr: float | None = flag(
        None, "Learning rate of what --freeze_mask_encoder keeps otherwise; None: --mask_lr.", low=0
    )
    detr_lr: float | None = flag(None, "Learning rate of the detector; None: --lr.", low=0)
    detr_adapter_lr: float | None = flag(
        None, "Learning rate of the detector's adapters, which start as nothing; None: --detr_lr.", low=0
    )
    lora_lr: float | None = flag(None, "Learning rate of the adapters; None: --lr.", low=0)
    lora_enable: bool = flag(
        False,
        "Train low-rank adapters beside frozen matrices, and no other weights but --lora_modules_to_save; what they are: the "
        "flags of LoRA.",
    )
    lora_modules_to_save: str = flag(
        "",
        "With --lora_enable: groups that are trained as a whole and saved with the adapters, by comma (embeddings,box,mask).",
    )
    no_decay_norm_bias: bool = flag(
        False,
        "--weight_decay leaves out norms, biases and embeddings; published: it is for every parameter alike.",
    )
    auto_scale_lr: bool = flag(
        False, "Multiply every learning rate by (tokens of a step / --lr_reference_batch_size)."
    )
    lr_scale_rule: Literal["linear", "sqrt"] = flag(
        "linear", "Of --auto_scale_lr: the ratio itself, or its square root."
    )
    lr_reference_batch_size: int = flag(
        0,
        "Of --auto_scale_lr: tokens per step, over all ranks and micro-batches, that the rates were chosen for.",
        low=0,
    )
    packed_lr_factor: float = flag(
        1.0,
        "Of --auto_scale_lr: another factor of every rate; published systems multiply by 0.945 where samples are packed.",
        low=0,
    )
    frozen_dtype: Dtype = flag(
        "fp32",
        "In what frozen weights lie in memory; with that of --param_dtype nothing is computed otherwise and they take half.",
    )
    print_param_details: bool = flag(
        True, "Say at the start how many parameters each group has, and how fast they learn."
    )
    validate_freezing: bool = flag(
        False,
        "Make sure at the end that what is frozen is as it was, bit for bit.",
    )
