"""Every flag of the published trainers: type, defaults, and what it does here. A table; no flag is parsed and ignored.

A flag is *implemented* (it has its published meaning), there *by design* (nothing here depends on it; another value than `plain`
is answered with a line that says what is done instead), or *not built* (a value that would switch the feature on is refused).
Types, help and our defaults stand in `train/args/`. docs/launch_lines.md is the same for people.

Source: the published trainers' argument tables (upstream Bagel 056b5fd, UniMedVL 307c62e, MedQ-Uni ddf03d5).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

TRAINERS: Mapping[str, str] = {
    "bagel": "Bagel, train/pretrain_unified_navit.py",
    "unimedvl": "UniMedVL, train/pretrain_unimedvl.py; MedQ-Uni, train/main.py",
    "pixel": "MedQ-Uni, train/main_sr_pixel_loss.py",
    "deepspeed": "MedQ-Uni, train/main_sr_pixel_loss_deepspeed.py",
    "memory": "MedQ-Uni, train/main_memory_efficient.py",
    "validation": "MedQ-Uni, train/main_benchmark_val.py",
    "documents": "named in the published guides, in no released trainer",
}

ZERO_STAGES = {0: "NO_SHARD", 1: "SHARD_GRAD_OP", 2: "SHARD_GRAD_OP", 3: "FULL_SHARD"}
"""DeepSpeed's stages by the strategy that divides the same things (stage 1 divides a little less than ours)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a value other than `plain` is answered with.

    Attributes:
        plain: the value that asks for what is done anyway.
        text: what is done instead, or why it is refused.
        refuse: stop the program; else say it and go on.
        unless: (flag, or `device`; value) with which the flag has its published meaning, so that nothing need be said.
    """

    plain: Any
    text: str
    refuse: bool = False
    unless: tuple[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """A published flag.

    Attributes:
        kind: `bool`, `int`, `float` or `text`.
        defaults: trainer -> its default; the first is the one that ours is compared with.
        answer: where it has not its published meaning under all circumstances.
        why: why our default is another.
    """

    kind: str
    defaults: Mapping[str, Any]
    answer: Answer | None = None
    why: str = ""

    @property
    def here(self) -> str:
        """`implemented`, `by design` or `not built`."""
        if self.answer is None or self.answer.unless is not None:
            return "implemented"
        return "not built" if self.answer.refuse else "by design"


def _both(value: Any, unimedvl: Any = ...) -> dict[str, Any]:
    """Default of Bagel, and of UniMedVL where that differs."""
    return {"bagel": value, "unimedvl": value if unimedvl is ... else unimedvl}


def _not_built(plain: Any, feature: str) -> Answer:
    return Answer(plain, f"{feature} is not built yet; leave the flag out", refuse=True)


def _wandb(default: Any) -> Answer:
    text = "nothing is sent to Weights & Biases without --enable_wandb True; TensorBoard files are in --results_dir"
    return Answer(default, text, unless=("enable_wandb", True))


def _hybrid(default: int) -> Answer:
    text = "counts for --sharding_strategy HYBRID_SHARD alone; the other strategies take all ranks alike"
    return Answer(default, text, unless=("sharding_strategy", "HYBRID_SHARD"))


_AS_THE_MODEL = "None means: as the files of --model_path say; a fresh model has the published default"

PUBLISHED: Mapping[str, Published] = {
    # Model
    "model_path": Published("text", _both("hf/BAGEL-7B-MoT")),
    "llm_path": Published(
        "text",
        _both("hf/Qwen2.5-0.5B-Instruct/"),
        why="a fresh language model is only built when it is asked for",
    ),
    "llm_qk_norm": Published("bool", _both(True), why=_AS_THE_MODEL),
    "tie_word_embeddings": Published("bool", _both(False), why=_AS_THE_MODEL),
    "layer_module": Published(
        "text", _both("Qwen2MoTDecoderLayer", "Qwen2MoTDecoderLayer_with_hidden_outputs"), why=_AS_THE_MODEL
    ),
    "vae_path": Published(
        "text", {"bagel": "flux/vae/ae.safetensors"}, why="None means: the autoencoder in --model_path"
    ),
    "vit_path": Published(
        "text",
        _both("hf/siglip-so400m-14-980-flash-attn2-navit/"),
        why="a tower other than the one of --model_path is only taken when it is asked for",
    ),
    "max_latent_size": Published("int", _both(32), why=_AS_THE_MODEL),
    "latent_patch_size": Published("int", _both(2), why=_AS_THE_MODEL),
    "vit_patch_size": Published("int", _both(14), why=_AS_THE_MODEL),
    "vit_max_num_patch_per_side": Published("int", _both(70), why=_AS_THE_MODEL),
    "connector_act": Published("text", _both("gelu_pytorch_tanh"), why=_AS_THE_MODEL),
    "interpolate_pos": Published("bool", _both(False), why=_AS_THE_MODEL),
    "vit_select_layer": Published("int", _both(-2), why=_AS_THE_MODEL),
    "vit_rope": Published("bool", _both(False), why=_AS_THE_MODEL),
    "text_cond_dropout_prob": Published("float", _both(0.1)),
    "vae_cond_dropout_prob": Published("float", _both(0.3)),
    "vit_cond_dropout_prob": Published("float", _both(0.3)),
    # Data
    "dataset_config_file": Published(
        "text",
        _both("data/configs/example.yaml"),
        why="there is no mixture that everybody has: it has to be named",
    ),
    "prefetch_factor": Published("int", _both(2)),
    "num_workers": Published("int", _both(4)),
    "max_num_tokens_per_sample": Published("int", _both(16384)),
    "max_num_tokens": Published("int", _both(36864)),
    "prefer_buffer_before": Published(
        "int",
        _both(16384),
        Answer(
            16384,
            "the sample that waits longest goes into the next pack; the flag is for --packer upstream_compat",
            unless=("packer", "upstream_compat"),
        ),
    ),
    "max_buffer_size": Published("int", _both(50)),
    "data_seed": Published("int", _both(42)),
    # Training: which modalities, where things go
    "visual_gen": Published("bool", _both(True)),
    "visual_und": Published("bool", _both(True)),
    "results_dir": Published("text", _both("results", "output")),
    "checkpoint_dir": Published(
        "text",
        _both("results/checkpoints"),
        why="None means: `checkpoints` in --results_dir, wherever that is",
    ),
    "wandb_project": Published("text", {"bagel": "bagel"}, _wandb("bagel")),
    "wandb_name": Published("text", _both("run", "med_bagel_project"), _wandb("run")),
    "wandb_runid": Published("text", {"bagel": "0"}, _wandb("0")),
    "wandb_resume": Published("text", {"bagel": "allow"}, _wandb("allow")),
    "wandb_offline": Published("bool", _both(False), _wandb(False)),
    "enable_tensorboard": Published("bool", {"unimedvl": True}),
    "max_checkpoints": Published("int", {"unimedvl": 5}),
    "global_seed": Published("int", _both(4396)),
    # Training: what it starts from
    "auto_resume": Published("bool", _both(False, True)),
    "resume_from": Published("text", _both(None)),
    "resume_model_only": Published("bool", _both(False)),
    "resume_model_optimizer": Published("bool", {"unimedvl": True}),
    "finetune_from_ema": Published("bool", _both(False)),
    "finetune_from_hf": Published("bool", _both(False)),
    "resume_from_ema": Published("text", {"documents": None}),
    # Training: steps, optimizer, losses
    "log_every": Published("int", _both(10)),
    "save_every": Published("int", _both(2000)),
    "total_steps": Published("int", _both(500_000)),
    "warmup_steps": Published("int", _both(2000)),
    "lr_scheduler": Published("text", _both("constant")),
    "lr": Published("float", _both(1e-4)),
    "min_lr": Published("float", _both(1e-7)),
    "e2e_lr": Published(
        "float", {"unimedvl": None}, Answer(None, "no published trainer uses it, and neither does this one")
    ),
    "vae_lr": Published(
        "float",
        {"unimedvl": None},
        Answer(None, "the autoencoder is never trained, so it has no learning rate"),
    ),
    "vit_lr": Published("float", {"unimedvl": None}),
    "llm_lr": Published("float", {"unimedvl": None}),
    "mot_und_lr": Published("float", {"memory": None}),
    "mot_gen_lr": Published("float", {"memory": None}),
    "beta1": Published("float", _both(0.9)),
    "beta2": Published("float", _both(0.95)),
    "eps": Published("float", _both(1e-15)),
    "ema": Published("float", _both(0.9999)),
    "max_grad_norm": Published("float", _both(1.0)),
    "timestep_shift": Published("float", _both(1.0)),
    "mse_weight": Published("float", _both(1.0)),
    "ce_weight": Published("float", _both(1.0)),
    "ce_loss_reweighting": Published("bool", _both(False)),
    "expected_num_tokens": Published("int", _both(32768)),
    "gradient_accumulation_steps": Published("int", {"bagel": 1}),
    "peak_device_tflops": Published("float", {"bagel": 0.0}),
    # Training: sharding
    "num_replicate": Published("int", _both(1), _hybrid(1)),
    "num_shard": Published(
        "int",
        _both(8),
        _hybrid(0),
        why="0 means: as many as there are ranks, so that any number of them runs",
    ),
    "sharding_strategy": Published("text", _both("HYBRID_SHARD")),
    "backward_prefetch": Published(
        "text",
        _both("BACKWARD_PRE"),
        Answer(
            "BACKWARD_PRE",
            "FSDP2 always gathers the next unit before the gradients of the present one are computed (BACKWARD_PRE)",
        ),
    ),
    "cpu_offload": Published(
        "bool",
        _both(False),
        Answer(
            False,
            "there is no GPU that the shards could be kept away from; they lie in host memory anyway",
            unless=("device", "cuda"),
        ),
    ),
    "zero_stage": Published(
        "int",
        {"deepspeed": 2},
        why="None means: --sharding_strategy says it; a stage is taken as the strategy it amounts to",
    ),
    "ds_config_file": Published(
        "text",
        {"deepspeed": None},
        Answer(
            None,
            "DeepSpeed is not used and the file is not read; sharding, precision and optimizer have flags of their own",
        ),
    ),
    "local_rank": Published(
        "int",
        {"deepspeed": -1},
        Answer(-1, "the launcher's environment (LOCAL_RANK) says which device a process has"),
    ),
    # Training: what is trained
    "freeze_llm": Published("bool", _both(False)),
    "freeze_vit": Published("bool", _both(False)),
    "freeze_vae": Published(
        "bool", _both(True), _not_built(True, "training the autoencoder together with the model")
    ),
    "freeze_und": Published("bool", _both(False)),
    "freeze_mot_und": Published("bool", {"memory": False}),
    "freeze_mot_gen": Published("bool", {"memory": False}),
    "copy_init_moe": Published(
        "bool",
        _both(True),
        why="None means: True where --llm_path gives the understanding expert, which is where it matters",
    ),
    "print_param_details": Published("bool", {"memory": True}),
    "validate_freezing": Published("bool", {"memory": False}),
    "use_flex": Published(
        "bool",
        _both(False),
        Answer(
            False,
            "FlexAttention has no backward pass on a CPU; --attention auto is used, which agrees with it to rounding",
            unless=("device", "cuda"),
        ),
    ),
    # The pixel loss
    "pixel_loss_weight": Published("float", {"pixel": 0.0}),
    "pixel_loss_type": Published("text", {"pixel": "l1"}),
    "pixel_loss_max_t": Published("float", {"pixel": 0.3}),
    "pixel_loss_paired_only": Published("bool", {"pixel": True}),
    "pixel_loss_chunk_size": Published("int", {"pixel": 2}),
    "pixel_loss_adaptive_chunk": Published("bool", {"pixel": True}),
    "pixel_loss_use_v0": Published("bool", {"pixel": False}),
    "ssim_loss_weight": Published("float", {"pixel": 0.0}),
    "ssim_loss_max_t": Published("float", {"pixel": 0.1}),
    "ssim_window_size": Published("int", {"pixel": 11}),
    "ssim_grad_scale": Published("float", {"pixel": 0.1}),
    # Validation
    "enable_validation": Published(
        "bool",
        {"validation": False},
        why="None means: where there is something to validate on, the mixture's `val:` groups or a file of them",
    ),
    "val_dataset_config_file": Published("text", {"validation": None}),
    "val_every": Published("int", {"validation": 10}),
    "val_steps": Published("int", {"validation": 50}),
}
"""Flag -> its row. Names and defaults are the published trainers' own; the list is closed."""


IMPLIED: Mapping[str, Callable[[Any], Mapping[str, Any]]] = {
    "zero_stage": lambda stage: {"sharding_strategy": ZERO_STAGES[stage]},
    "resume_from_ema": lambda path: {
        "resume_from": path,
        "resume_model_only": True,
        "finetune_from_ema": True,
    },
}
"""Flag -> what its value means in other flags."""


def implied_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that flags in `IMPLIED` mean.

    Raises:
        ValueError: if one that was given says otherwise.
    """
    values: dict[str, Any] = {}
    for name, meaning in IMPLIED.items():
        if given.get(name) is None:
            continue
        for flag, value in meaning(given[name]).items():
            if given.get(flag, value) != value:
                raise ValueError(
                    f"--{name} {given[name]} means --{flag} {value}, but --{flag} {given[flag]} is given: leave one out"
                )
            values[flag] = value
    return values


def refuse_unbuilt(values: Mapping[str, Any]) -> None:
    """Stop over a value that would switch on what is not built.

    Args:
        values: of every flag.

    Raises:
        ValueError: naming the flag.
    """
    for name, answer in _answers(values):
        if answer.refuse:
            raise ValueError(f"--{name} {values[name]}: {answer.text}")


def start_up_lines(values: Mapping[str, Any], device_type: str) -> list[str]:
    """What is to be said of flags that cannot apply, or that stand for others; one line each.

    Args:
        values: of every flag.
        device_type: `cpu` or `cuda`.
    """
    lines = [
        f"--{name} {values[name]}: taken as "
        + " ".join(f"--{flag} {value}" for flag, value in meaning(values[name]).items())
        for name, meaning in IMPLIED.items()
        if values.get(name) is not None
    ]
    answers = _answers({**values, "device": device_type})
    return lines + [f"--{name} {values[name]}: {answer.text}" for name, answer in answers]


def _answers(values: Mapping[str, Any]) -> list[tuple[str, Answer]]:
    """The rows whose value is not the plain one, and not given its meaning by another flag."""
    found = []
    for name, row in PUBLISHED.items():
        answer = row.answer
        if answer is None or name not in values or values[name] == answer.plain:
            continue
        if answer.unless is None or values.get(answer.unless[0]) != answer.unless[1]:
            found.append((name, answer))
    return found


def spelled_out(name: str, known: Mapping[str, Any]) -> str:
    """A flag's name in full. Half a name is taken where one published flag alone begins like it (`num_worker`), as in published
    scripts; the published list is closed, so flags that are added here never change what half a name means.

    Args:
        name: as written, with underscores.
        known: flags of ours.

    Raises:
        ValueError: if several published flags begin like it.
    """
    if name in known or not name:
        return name
    meant = [flag for flag in PUBLISHED if flag.startswith(name)]
    if len(meant) > 1:
        raise ValueError(f"--{name} may mean --{', --'.join(meant)}; write it out")
    return meant[0] if meant else name
