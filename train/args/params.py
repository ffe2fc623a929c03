"""What is trained, and how fast."""

from dataclasses import dataclass

from train.args.flag import flag


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamArgs:
    """Which parameters are trained, and how fast. Groups: train/param_manager.py."""

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
    freeze_vit: bool = flag(False, "Keep the understanding encoder as it is.")
    freeze_connector: bool = flag(False, "Keep the connector from encoder to language model as it is.")
    freeze_flow: bool = flag(
        False, "Keep the latents' input and output layers and the time embedder as they are."
    )
    freeze_box: bool = flag(False, "Keep the box head as it is.")
    freeze_mask: bool = flag(False, "Keep the mask head as it is.")
    llm_lr: float | None = flag(None, "Learning rate of the language model; None: --lr.", low=0)
    mot_und_lr: float | None = flag(None, "Learning rate of the understanding expert; None: --llm_lr.", low=0)
    mot_gen_lr: float | None = flag(None, "Learning rate of the generation expert; None: --llm_lr.", low=0)
    vit_lr: float | None = flag(None, "Learning rate of the understanding encoder; None: --lr.", low=0)
    connector_lr: float | None = flag(None, "Learning rate of the connector; None: --lr.", low=0)
    flow_lr: float | None = flag(
        None, "Learning rate of the latents' layers and the time embedder; None: --lr.", low=0
    )
    box_lr: float | None = flag(None, "Learning rate of the box head; None: --lr.", low=0)
    mask_lr: float | None = flag(None, "Learning rate of the mask head; None: --lr.", low=0)
    print_param_details: bool = flag(
        True, "Say at the start how many parameters each group has, and how fast they learn."
    )
    validate_freezing: bool = flag(
        False,
        "Make sure at the end that what is frozen is as it was, bit for bit.",
    )
