"""What model, from where."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag

Activation = Literal["gelu_pytorch_tanh", "gelu", "silu", "relu"]
Layer = Literal["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelArgs:
    """Model. A flag that is not given is as the files of --model_path say; one that contradicts them is an error."""

    model_path: str = flag(
        "hf/BAGEL-7B-MoT",
        "Directory in the published layout: configs, tokenizer, autoencoder and, if trained, weights.",
    )
    from_scratch: bool = flag(
        False,
        "What no --llm_path or --vit_path gives starts from random weights, drawn from --global_seed, even if --model_path has "
        "some; without it a directory without weights is an error.",
    )
    finetune_from_hf: bool = flag(
        False, "The model is the one of --model_path; together with --llm_path or --vit_path an error."
    )
    llm_path: str | None = flag(
        None,
        "Hugging Face directory of a Qwen2 or Qwen2.5 language model: build a fresh model around it (needs --from_scratch True).",
    )
    vit_path: str | None = flag(
        None,
        "Start the vision tower from here, whatever the rest starts from: a directory with `vit_model.safetensors`, or a Hugging "
        "Face SigLIP directory, which with --from_scratch True also says what the tower is.",
    )
    vae_path: str | None = flag(
        None,
        "Autoencoder: a directory with `ae.safetensors`, such a file, or a diffusers AutoencoderKL directory; None: "
        "--model_path.",
    )
    mask_path: str | None = flag(
        None,
        "Start the mask head from here, whatever the rest starts from: a Hugging Face SAM directory (`type: sam`), or one of "
        "train/main_mask_autoencoder.py (`type: autoencoder`); what it lacks is as in --model_path, or else fresh.",
    )
    copy_init_moe: bool | None = flag(
        None,
        "Start the generation expert as a copy of the understanding expert; None: if --llm_path gives that one.",
    )
    layer_module: Layer | None = flag(
        None, "Decoder layer; None: as --model_path says, fresh: Qwen2MoTDecoderLayer."
    )
    llm_qk_norm: bool | None = flag(
        None, "Normalise queries and keys of every head; None: as --model_path says, fresh: True."
    )
    tie_word_embeddings: bool | None = flag(
        None, "Output layer and embeddings are one tensor; None: as --model_path says, fresh: False."
    )
    vit_select_layer: int | None = flag(
        None,
        "The tower's output is that of this layer, from the end of what `vit_config.json` counts (-1: the last one); later "
        "layers are not built; None: as --model_path says, published and fresh: -2.",
        high=-1,
    )
    vit_rope: bool | None = flag(
        None, "Rotary instead of learned positions in the tower; None: as --model_path says, fresh: False."
    )
    vit_patch_size: int | None = flag(
        None, "Side of a patch in pixels; None: as --model_path or --vit_path says.", low=1
    )
    vit_max_num_patch_per_side: int | None = flag(
        None,
        "Side of the table of the tower's positions, which pictures must fit into; None: as --model_path says, fresh: as many as "
        "the tower has learned.",
        low=1,
    )
    latent_patch_size: int | None = flag(
        None, "Latent cells per side that make one token; None: as --model_path says, else 2.", low=1
    )
    max_latent_size: int | None = flag(
        None,
        "Side of the table of latent positions, which drawn pictures must fit into; None: as --model_path says, fresh: 32.",
        low=1,
    )
    connector_act: Activation | None = flag(
        None, "Activation of the connector; None: as --model_path says, else gelu_pytorch_tanh."
    )
    visual_gen: bool = flag(
        True, "Build what makes pictures; without, its weights are neither read nor written."
    )
    visual_und: bool = flag(
        True,
        "Build what sees pictures (tower, connector); without, its weights are neither read nor written.",
    )
    interpolate_pos: bool | None = flag(
        None,
        "Spread every picture over the whole position tables instead of using their upper left corner; None: as --model_path "
        "says, else False.",
    )
