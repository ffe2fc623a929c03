"""Flags and run files -> frozen argument groups; `--help` and the checks come from these fields.

A value is taken from, last wins: the field's default, the `_base_` files of a run file, the run file (`--config run.yaml`, any
flag by its name), the command line. All flags of the published trainers are here, with their names and, but for the exceptions in
`train/published.py`, their defaults; both `--a_b` and `--a-b` work, booleans take `True` / `False` or stand alone. In: argv. Out:
`Args`.
"""

import argparse
import difflib
import math
import os
import sys
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

import yaml

from data.run_file import run_file_lines
from train.published import implied_values, refuse_unbuilt, spelled_out

Activation = Literal["gelu_pytorch_tanh", "gelu", "silu", "relu"]
Attention = Literal["auto", "split", "batched", "flex"]
Dtype = Literal["fp32", "bf16"]
Layer = Literal["Qwen2DecoderLayer", "Qwen2MoEDecoderLayer", "Qwen2MoTDecoderLayer"]
Packer = Literal["conserving", "upstream_compat"]
Strategy = Literal["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "NO_SHARD"]


def flag(default: Any, help: str, *, low: float = -math.inf, high: float = math.inf) -> Any:
    """A field with its help sentence and the range of its values (both ends belong to it)."""
    return field(default=default, metadata={"help": help, "low": low, "high": high})


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


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArgs:
    """Data."""

    dataset_config_file: str = flag(
        "", "YAML file of the mixture: groups of datasets with their weights and transforms."
    )
    index_cache_dir: str = flag(
        "",
        "Directory for the indexes of the data; without it (and without WEFT_INDEX_CACHE_DIR) they lie beside the data.",
    )
    data_seed: int = flag(42, "Seed of the data's order and of every random choice about a sample.", low=0)
    num_workers: int = flag(
        4, "Processes per rank that prepare packs; 0 prepares them in the training process.", low=0
    )
    prefetch_factor: int = flag(2, "Packs that each worker prepares ahead.", low=1)
    num_lanes: int = flag(
        48,
        "Logical shards of the data order, at least one per rank; best a multiple of the numbers of ranks. It stays for a run's "
        "life.",
        low=1,
    )
    expected_num_tokens: int = flag(32768, "A pack is full when it has this many tokens.", low=1)
    max_num_tokens: int = flag(36864, "No pack has more tokens than this.", low=1)
    max_num_tokens_per_sample: int = flag(16384, "A sample with more tokens is rejected.", low=1)
    max_attention_pairs: int = flag(
        0,
        "No pack has more (query, key) pairs for attention to compute, and a sample with more is rejected; 0: no bound.",
        low=0,
    )
    max_buffer_size: int = flag(
        50,
        "Samples that may wait, per lane, for a pack they fit in; no sample waits for more packs than this.",
        low=0,
    )
    packer: Packer = flag(
        "conserving",
        "Which samples share a pack: `conserving` loses none, `upstream_compat` chooses (and loses) as the published packer.",
    )
    prefer_buffer_before: int = flag(
        16384,
        "Samples that wait come first while a pack has fewer tokens; for --packer upstream_compat.",
        low=0,
    )
    max_reject_fraction: float = flag(
        0.001, "Share of a group's records that may be unusable before the run stops.", low=0, high=1
    )
    text_cond_dropout_prob: float = flag(
        0.1, "Chance to leave out a text that a generated image depends on.", low=0, high=1
    )
    vit_cond_dropout_prob: float = flag(
        0.3, "Chance to leave out an understanding image as a condition.", low=0, high=1
    )
    vae_cond_dropout_prob: float = flag(
        0.3, "Chance to leave out a clean autoencoder image as a condition.", low=0, high=1
    )
    timestep_shift: float = flag(
        1.0, "Shift of the flow's training timesteps; above 1 means noisier.", low=1e-6
    )
    latent_cache_mb: int = flag(
        0,
        "Memory per rank for autoencoder encodings of images seen before, in MiB; 0 encodes every time.",
        low=0,
    )


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


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimArgs:
    """Optimizer, schedule, average of the weights."""

    lr: float = flag(1e-4, "Peak learning rate.", low=0)
    min_lr: float = flag(
        1e-7, "Where the cosine ends, for a group with --lr; other groups end in proportion.", low=0
    )
    lr_scheduler: Literal["constant", "cosine"] = flag("constant", "What follows the warm-up.")
    warmup_steps: int = flag(2000, "Steps in which the learning rate rises from 0.", low=0)
    total_steps: int = flag(500_000, "Optimizer steps of the whole run.", low=1)
    beta1: float = flag(0.9, "AdamW: decay of the first moment.", low=0, high=1)
    beta2: float = flag(0.95, "AdamW: decay of the second moment.", low=0, high=1)
    eps: float = flag(1e-15, "AdamW: added to the denominator.", low=0)
    weight_decay: float = flag(0.0, "AdamW: decoupled weight decay.", low=0)
    max_grad_norm: float = flag(1.0, "Gradients are scaled down to this joint L2 norm; 0 never.", low=0)
    ema: float = flag(0.9999, "Decay of the weights' moving average.", low=0, high=1)
    ema_warmup: bool = flag(
        False, "Average faster in the beginning: after n updates the decay is at most (1+n)/(10+n)."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossArgs:
    """Losses. Each is divided by its own count over all ranks."""

    ce_weight: float = flag(1.0, "Weight of the text's cross-entropy.", low=0)
    mse_weight: float = flag(1.0, "Weight of the flow's squared error.", low=0)
    box_l1_weight: float = flag(1.0, "Weight of the boxes' L1 distance.", low=0)
    box_giou_weight: float = flag(1.0, "Weight of the boxes' 1 - GIoU.", low=0)
    mask_bce_weight: float = flag(1.0, "Weight of the masks' binary cross-entropy.", low=0)
    mask_dice_weight: float = flag(1.0, "Weight of the masks' Dice loss.", low=0)
    loss_divisor: Literal["step", "micro_batch"] = flag(
        "step",
        "`step`: each loss is divided by its count over all ranks and micro-batches of a step; `micro_batch`, as published: each "
        "micro-batch by its own count over all ranks, and they are averaged.",
    )
    ce_loss_reweighting: bool = flag(
        False, "Weigh the tokens of a text by 1/sqrt(its length), not all the same."
    )

    def weights(self) -> dict[str, float]:
        """Weight of each row of `modeling.losses.LOSSES` that is used."""
        ce = "ce_reweighted" if self.ce_loss_reweighting else "ce"
        return {
            ce: self.ce_weight,
            "mse": self.mse_weight,
            "box_l1": self.box_l1_weight,
            "box_giou": self.box_giou_weight,
            "mask_bce": self.mask_bce_weight,
            "mask_dice": self.mask_dice_weight,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class FsdpArgs:
    """Sharding, precision, kernels."""

    sharding_strategy: Strategy = flag(
        "HYBRID_SHARD", "How parameters, gradients and optimizer state are divided."
    )
    zero_stage: int | None = flag(
        None,
        "DeepSpeed's name of a strategy: 0 is NO_SHARD, 1 and 2 are SHARD_GRAD_OP, 3 is FULL_SHARD.",
        low=0,
        high=3,
    )
    num_replicate: int = flag(1, "Replicas of HYBRID_SHARD.", low=1)
    num_shard: int = flag(0, "Ranks that share one replica; 0: all ranks / --num_replicate.", low=0)
    min_unit_params: int = flag(
        1_000_000,
        "A module with fewer parameters is not sharded alone: its collective would cost more than it saves.",
        low=0,
    )
    recompute: bool = flag(
        True, "Run transformer layers again in backward instead of keeping their activations."
    )
    param_dtype: Dtype = flag(
        "bf16", "Precision of forward and backward; the weights themselves are kept in fp32."
    )
    reduce_dtype: Dtype = flag("bf16", "Precision in which gradients are summed over ranks.")
    matmul_precision: Literal["highest", "high", "medium"] = flag(
        "highest", "Inside fp32 matrix products: fp32, TF32, or bf16 products with fp32 sums (torch's names)."
    )
    attention: Attention = flag(
        "auto", "How the decoder's attention is computed; they agree to rounding. `flex` needs a GPU."
    )
    use_flex: bool = flag(False, "The same as --attention flex, where there is a GPU.")
    cpu_offload: bool = flag(
        False,
        "Keep weights, gradients and optimizer state in host memory, where the optimizer then runs; a unit's weights come to the "
        "GPU when it computes.",
    )

    def backend(self, device_type: str) -> str:
        """The attention asked for: `--use_flex` counts on a GPU."""
        return "flex" if self.use_flex and device_type == "cuda" else self.attention

    def home(self, device: str) -> str:
        """Where shards lie between their uses, on a rank that computes on `device`."""
        return "cpu" if self.cpu_offload else device


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointArgs:
    """Output, checkpoints, resuming."""

    results_dir: str = flag("results", "Where logs go.")
    checkpoint_dir: str | None = flag(None, "Where checkpoints go; None: `checkpoints` in --results_dir.")
    save_every: int = flag(2000, "Steps between checkpoints; the last step is always saved.", low=1)
    max_checkpoints: int = flag(5, "Newest checkpoints to keep; 0 keeps all.", low=0)
    auto_resume: bool = flag(
        False, "Continue from the newest complete checkpoint in --checkpoint_dir, if there is one."
    )
    resume_from: str | None = flag(
        None, "Continue from this checkpoint (a step's directory, or the newest in a directory of them)."
    )
    resume_model_only: bool = flag(
        False, "Take only the weights from --resume_from: step, optimizer and data start afresh."
    )
    resume_model_optimizer: bool = flag(
        True, "Take the optimizer's moments along when a run is continued; else they start from zero."
    )
    resume_from_ema: str | None = flag(
        None,
        "Start from the averaged weights found here; the same as --resume_from with --resume_model_only and --finetune_from_ema.",
    )
    finetune_from_ema: bool = flag(
        False, "Where only weights are taken (--resume_model_only, --model_path), take the averaged ones."
    )

    @property
    def directory(self) -> Path:
        """Where checkpoints go."""
        return Path(self.checkpoint_dir) if self.checkpoint_dir else Path(self.results_dir) / "checkpoints"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainArgs:
    """The loop."""

    global_seed: int = flag(4396, "Seed of random starting weights and of torch's generators.", low=0)
    gradient_accumulation_steps: int = flag(1, "Packs per rank and optimizer step.", low=1)
    log_every: int = flag(10, "Steps between progress lines.", low=1)
    enable_tensorboard: bool = flag(True, "Write TensorBoard files to `tensorboard` in --results_dir.")
    enable_wandb: bool = flag(False, "Send what TensorBoard gets to Weights & Biases, too.")
    wandb_project: str = flag("bagel", "Project there.")
    wandb_name: str = flag("run", "Name of the run there.")
    wandb_runid: str = flag("0", "Tells runs of one name apart: the run's id there is NAME-runRUNID.")
    wandb_resume: str = flag("allow", "Whether a run of that id is continued: allow, must, never, auto.")
    wandb_offline: bool = flag(False, "Write the run to disk instead of sending it.")
    peak_device_tflops: float = flag(
        0.0,
        "What one device can do in bf16, in TFLOP/s, for the MFU in log lines; 0: as known for the device's name, else no MFU.",
        low=0,
    )
    dist_timeout_s: float = flag(600.0, "Seconds a rank waits for the others before it gives up.", low=1)
    validate_only: bool = flag(False, "Check flags, mixture, data and model, then stop without training.")


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedArgs:
    """Published flags of what is not built yet, or of what nothing here depends on: answered with a line (train/published.py)."""

    backward_prefetch: str = flag(
        "BACKWARD_PRE", "When FSDP gathers the next unit in backward; always early here."
    )
    freeze_vae: bool = flag(True, "Keep the autoencoder as it is; always so here.")
    vae_lr: float | None = flag(None, "Learning rate of the autoencoder, which is not trained.", low=0)
    e2e_lr: float | None = flag(None, "Used by no trainer.", low=0)
    ds_config_file: str | None = flag(None, "Configuration file of DeepSpeed, which is not used.")
    local_rank: int = flag(
        -1, "Place on the node as told by DeepSpeed's launcher; torchrun's environment counts."
    )
    pixel_loss_weight: float = flag(
        0.0, "Weight of the loss on decoded pictures; not built, as the ten flags below.", low=0
    )
    pixel_loss_type: Literal["l1", "l2", "mse"] = flag("l1", "Of the pixel loss: the distance.")
    pixel_loss_max_t: float = flag(0.3, "Of the pixel loss: the largest timestep.", low=0, high=1)
    pixel_loss_paired_only: bool = flag(True, "Of the pixel loss: paired pictures only.")
    pixel_loss_chunk_size: int = flag(2, "Of the pixel loss: pictures decoded at a time.", low=1)
    pixel_loss_adaptive_chunk: bool = flag(True, "Of the pixel loss: fewer large pictures at a time.")
    pixel_loss_use_v0: bool = flag(False, "Of the pixel loss: the first version of it.")
    ssim_loss_weight: float = flag(
        0.0, "Weight of the structural similarity of decoded pictures; not built.", low=0
    )
    ssim_loss_max_t: float = flag(0.1, "Of the SSIM loss: the largest timestep.", low=0, high=1)
    ssim_window_size: int = flag(11, "Of the SSIM loss: side of the window.", low=1)
    ssim_grad_scale: float = flag(0.1, "Of the SSIM loss: factor of its gradient.", low=0)
    enable_validation: bool = flag(False, "Validate while training; not built, as the three flags below.")
    val_dataset_config_file: str | None = flag(None, "Of validation: the mixture.")
    val_every: int = flag(10, "Of validation: steps between.", low=1)
    val_steps: int = flag(50, "Of validation: packs.", low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Args:
    """All groups. A function takes the smallest group it needs, never all of them."""

    model: ModelArgs = ModelArgs()
    data: DataArgs = DataArgs()
    params: ParamArgs = ParamArgs()
    optim: OptimArgs = OptimArgs()
    loss: LossArgs = LossArgs()
    fsdp: FsdpArgs = FsdpArgs()
    checkpoint: CheckpointArgs = CheckpointArgs()
    train: TrainArgs = TrainArgs()
    published: PublishedArgs = PublishedArgs()

    def flat(self) -> dict[str, Any]:
        """Every flag with its value: what a run file holds."""
        groups = (getattr(self, group.name) for group in fields(self))
        return {f.name: getattr(group, f.name) for group in groups for f in fields(group)}


@dataclass(frozen=True, slots=True)
class _Flag:
    """One row of the flag table: where its value goes and what it may be."""

    group: str
    type: Any
    field: Field[Any]

    @property
    def optional(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def plain(self) -> Any:
        """The type without `| None`."""
        if get_origin(self.type) in (Union, types.UnionType):
            return next(t for t in get_args(self.type) if t is not type(None))
        return self.type

    @property
    def kind(self) -> str:
        choices = get_args(self.plain) if get_origin(self.plain) is Literal else ()
        return "|".join(choices) if choices else {str: "text"}.get(self.plain, self.plain.__name__)


GROUPS: dict[str, Any] = {
    "model": ModelArgs,
    "data": DataArgs,
    "params": ParamArgs,
    "optim": OptimArgs,
    "loss": LossArgs,
    "fsdp": FsdpArgs,
    "checkpoint": CheckpointArgs,
    "train": TrainArgs,
    "published": PublishedArgs,
}


def _flag_table() -> dict[str, _Flag]:
    table = {}
    for group, group_class in GROUPS.items():
        hints = get_type_hints(group_class)
        table.update({f.name: _Flag(group, hints[f.name], f) for f in fields(group_class)})
    return table


BOOLEANS = {
    **dict.fromkeys(("true", "t", "yes", "y", "1"), True),
    **dict.fromkeys(("false", "f", "no", "n", "0"), False),
}
"""Words for booleans, as the published trainers take them."""

FLAGS = _flag_table()
"""Flag -> its row, in the order of `--help`."""


def parse_args(argv: Sequence[str] | None = None) -> Args:
    """Command line -> arguments. `--help` and `--print_config` print and end the program.

    Args:
        argv: without the program's name; None: the process's own.

    Raises:
        ValueError: naming the flag or the file and key that is wrong, and the nearest one that exists.
    """
    words = [_flag_word(word) for word in (sys.argv[1:] if argv is None else argv)]
    known, unknown = _parser().parse_known_args(words)
    if unknown:
        raise ValueError(
            f"unknown argument {unknown[0]}{_nearest(unknown[0].lstrip('-').partition('=')[0], '--')}"
        )
    given = vars(known)
    print_config, run_file = given.pop("print_config"), given.pop("config")
    values = {**(read_run_file(Path(run_file)) if run_file else {}), **given}
    args = build_args(values)
    if print_config:
        sys.stdout.write(yaml.safe_dump(args.flat(), sort_keys=False))
        raise SystemExit(0)
    if not args.data.dataset_config_file:
        raise ValueError("--dataset_config_file is required: the YAML file that says what to train on")
    return args


def build_args(values: Mapping[str, Any]) -> Args:
    """Values by flag name -> checked arguments; what is not named keeps its default.

    Raises:
        ValueError: for a value out of range, or two that do not go together.
    """
    values = {**values, **implied_values(values)}
    for name, value in values.items():
        low, high = FLAGS[name].field.metadata["low"], FLAGS[name].field.metadata["high"]
        if isinstance(value, int | float) and not low <= value <= high:
            limits = f"from {low:g} to {high:g}"
            if math.isinf(low) or math.isinf(high):
                limits = f"at most {high:g}" if math.isinf(low) else f"at least {low:g}"
            raise ValueError(f"--{name} {value} must be {limits}")
    groups = {
        group: group_class(**{n: v for n, v in values.items() if FLAGS[n].group == group})
        for group, group_class in GROUPS.items()
    }
    args = Args(**groups)
    _require_consistent(args)
    refuse_unbuilt(args.flat())
    return args


def read_run_file(path: Path) -> dict[str, Any]:
    """Flags of a run file, with those of its `_base_` files (relative to it) underneath.

    Raises:
        ValueError: if a file is missing or is no flat mapping of flags, or includes itself.
    """
    values: dict[str, Any] = {}
    for file, key, value in run_file_lines(path):
        name = key.replace("-", "_")
        if name not in FLAGS:
            raise ValueError(f"--config {file}: unknown key {key!r}{_nearest(name)}")
        try:
            values[name] = _convert(FLAGS[name], value)
        except ValueError as error:
            raise ValueError(f"--config {file}: {key}: {error}") from error
    return values


def _convert(row: _Flag, value: Any) -> Any:
    """A value as written (a word of the command line, or a YAML scalar) -> the flag's type."""
    kind = row.plain
    if row.optional and (value is None or value == "None"):
        return None
    if kind is bool:
        if isinstance(value, bool):
            return value
        if str(value).lower() in BOOLEANS:
            return BOOLEANS[str(value).lower()]
    elif isinstance(value, bool) or not isinstance(value, str | int | float):
        pass  # a list, a mapping, a yes/no: no flag is any of these
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
    elif kind is str:
        return os.path.expanduser(str(value))
    else:
        try:
            number = kind(value)
        except (ValueError, OverflowError):
            number = math.nan
        if math.isfinite(number) and (isinstance(value, str) or number == value):
            return number
    raise ValueError(f"{value!r} is not {row.kind}")


_OTHER_WORDS = {
    "help": None,
    "config": None,
    "print_config": None,
    **{f"no_{n}": r for n, r in FLAGS.items()},
}
"""What may follow `--` besides the flags."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (see --help)")


class _Store(argparse.Action):
    """Converts by the flag's row, so that the command line and run files agree on every type."""

    def __call__(self, parser, namespace, value, option_string=None):  # type: ignore[no-untyped-def]
        if option_string and option_string.startswith("--no_"):
            value = "False"
        elif value is None:  # a boolean that stands alone
            value = "True"
        try:
            setattr(namespace, self.dest, _convert(FLAGS[self.dest], value))
        except ValueError as error:
            raise ValueError(f"{option_string} {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="train/main.py",
        allow_abbrev=False,  # see `train.published.spelled_out`
        usage="torchrun --standalone --nproc_per_node=N %(prog)s --dataset_config_file FILE [--config FILE] [--flag value ...]",
        description="Train one model that reads, answers, draws, points and segments.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=40, width=120),
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with any of the flags below; `_base_: FILE` inherits."
    )
    parser.add_argument("--print_config", action="store_true", help="Print every value in force and stop.")
    for group, group_class in GROUPS.items():
        section = parser.add_argument_group(group_class.__doc__.rstrip("."))
        for name, row in FLAGS.items():
            if row.group == group:
                _add(section, name, row)
    return parser


def _add(section: Any, name: str, row: _Flag) -> None:
    is_switch = row.plain is bool
    default = row.field.default
    shown = "" if default in ("", MISSING) else f" [{default}]"
    section.add_argument(
        f"--{name}",
        dest=name,
        action=_Store,
        default=argparse.SUPPRESS,
        nargs="?" if is_switch else None,
        metavar=row.kind,
        help=(row.field.metadata["help"] + shown).replace("%", "%%"),
    )
    if is_switch:
        section.add_argument(
            f"--no_{name}",
            dest=name,
            action=_Store,
            nargs=0,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )


def _flag_word(word: str) -> str:
    """`--a-b=c-d` -> `--a_b=c-d`, with the flag's name in full."""
    if not word.startswith("--"):
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{spelled_out(name.replace('-', '_'), _OTHER_WORDS | FLAGS)}{equals}{value}"


def _nearest(name: str, prefix: str = "") -> str:
    close = difflib.get_close_matches(name.replace("-", "_"), FLAGS, n=1)
    return f"; did you mean {prefix}{close[0]}?" if close else ""


def _require_consistent(args: Args) -> None:
    data, optim, checkpoint = args.data, args.optim, args.checkpoint
    if data.expected_num_tokens > data.max_num_tokens:
        raise ValueError(
            f"--expected_num_tokens {data.expected_num_tokens} is more than --max_num_tokens {data.max_num_tokens}; "
            "a pack could never be full"
        )
    if optim.lr_scheduler == "cosine" and optim.warmup_steps >= optim.total_steps:
        raise ValueError(
            f"--warmup_steps {optim.warmup_steps} leaves nothing of --total_steps {optim.total_steps} for the cosine"
        )
    if optim.lr_scheduler == "cosine" and optim.min_lr > optim.lr:
        raise ValueError(f"--min_lr {optim.min_lr} is above --lr {optim.lr}")
    if checkpoint.resume_model_only and checkpoint.resume_from is None:
        raise ValueError("--resume_model_only needs --resume_from: the checkpoint to take the weights from")
    if args.model.finetune_from_hf and (other := args.model.llm_path or args.model.vit_path):
        raise ValueError(
            f"--finetune_from_hf True takes the model of --model_path {args.model.model_path}; {other} (--llm_path, --vit_path) "
            "would not be used: leave one of the two out"
        )
    if checkpoint.resume_model_only and args.model.vit_path and not args.model.llm_path:
        raise ValueError(
            "--vit_path with --resume_model_only: the checkpoint has a vision tower of its own; leave one of the two out"
        )
    if args.fsdp.use_flex and args.fsdp.attention not in ("auto", "flex"):
        raise ValueError(f"--use_flex means --attention flex, but --attention {args.fsdp.attention} is given")
