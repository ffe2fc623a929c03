"""Which parameters belong together, which of them are trained, and at what rate.

A row of `PARAM_GROUPS` is all a new group needs, besides its `--freeze_x` and `--x_lr` in `train/args/params.py`. Call `freeze`
before sharding, `optimizer_groups` after it; both go by parameter names, which sharding leaves as they are. The autoencoder is no
part of the model, and frozen.
"""

import hashlib
import math
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from train.args import ParamArgs
from train.distributed.sharding import local


@dataclass(frozen=True, slots=True, kw_only=True)
class ParamGroup:
    """A group of parameters.

    Attributes:
        pattern: regular expression at the beginning of the parameter's name; the first group that matches has it.
        freeze: flags of `ParamArgs` of which any keeps the group as it is.
        lr: flags of `ParamArgs` that give its learning rate; the first that is set counts, else `--lr`. 0 freezes as well.
    """

    pattern: str
    freeze: tuple[str, ...] = ()
    lr: tuple[str, ...] = ()


PARAM_GROUPS: Mapping[str, ParamGroup] = {
    "lora": ParamGroup(pattern=r".+\.lora_[AB]\.", lr=("lora_lr",)),
    "embeddings": ParamGroup(
        pattern=r"language_model\.(model\.embed_tokens|lm_head)\.",
        freeze=("freeze_llm", "freeze_embeddings"),
        lr=("embeddings_lr", "llm_lr"),
    ),
    "llm_gen": ParamGroup(
        pattern=r"language_model\..*_moe_gen\.",
        freeze=("freeze_llm", "freeze_mot_gen"),
        lr=("mot_gen_lr", "llm_lr"),
    ),
    "llm_und": ParamGroup(
        pattern=r"language_model\.", freeze=("freeze_llm", "freeze_mot_und"), lr=("mot_und_lr", "llm_lr")
    ),
    # With `freeze_und` the decoder lets no gradient pass (`Qwen2Config.freeze_und`); the heads would still reach the tower.
    "vit": ParamGroup(pattern=r"vit_model\.", freeze=("freeze_vit", "freeze_und"), lr=("vit_lr",)),
    "connector": ParamGroup(
        pattern=r"connector\.", freeze=("freeze_connector", "freeze_und"), lr=("connector_lr",)
    ),
    "flow": ParamGroup(
        pattern=r"(time_embedder|vae2llm|llm2vae)\.", freeze=("freeze_flow",), lr=("flow_lr",)
    ),
    "box": ParamGroup(pattern=r"heads\.box\.", freeze=("freeze_box",), lr=("box_lr",)),
    "mask_encoder": ParamGroup(
        pattern=r"heads\.mask\.(vision_encoder|autoencoder)\.",
        freeze=("freeze_mask_encoder", "freeze_mask"),
        lr=("mask_encoder_lr", "mask_lr"),
    ),
    "mask": ParamGroup(pattern=r"heads\.mask\.", freeze=("freeze_mask",), lr=("mask_lr",)),
    "detr_adapter": ParamGroup(
        pattern=r"heads\.detr\.adapters\.", freeze=("freeze_detr",), lr=("detr_adapter_lr", "detr_lr")
    ),
    "detr": ParamGroup(pattern=r"heads\.detr\.", freeze=("freeze_detr",), lr=("detr_lr",)),
}

MIN_SIDE = 64
"""Below, an orthogonal update has too few directions to be worth its products."""

EMBEDDING = re.compile(r"\.(embed_tokens|position_embedding)\.weight$")


def group_of(name: str) -> str | None:
    """Group that a parameter belongs to, None if no pattern matches."""
    return next((group for group, row in PARAM_GROUPS.items() if re.match(row.pattern, name)), None)


def freeze(model: nn.Module, args: ParamArgs, lr: float = 1.0) -> None:
    """Switch off the gradients of the groups that `args` keeps as they are.

    Args:
        model: with its adapters.
        args: what is trained.
        lr: `--lr`, of groups without a rate of their own; here it only counts whether it is 0.

    Raises:
        ValueError: if a trainable parameter is in no group, or nothing is left to train.
    """
    frozen = frozen_groups(args, lr)
    for name, p in model.named_parameters():
        if p.requires_grad and _require_group(name) in frozen:
            p.requires_grad_(False)
    if args.lora_enable and "lora" not in frozen:
        return  # adapters are trained, also where they are only counted (train/memory.py)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"nothing is left to train: {', '.join(sorted(frozen))} are all frozen")


def frozen_groups(args: ParamArgs, lr: float = 1.0) -> dict[str, str]:
    """Group that stays as it is -> the flag that says so.

    Raises:
        ValueError: if `--lora_modules_to_save` names no group.
    """
    saved = [word.strip() for word in args.lora_modules_to_save.split(",") if word.strip()]
    if saved and not args.lora_enable:
        raise ValueError(f"--lora_modules_to_save {args.lora_modules_to_save}: is for --lora_enable True")
    if unknown := [name for name in saved if name not in PARAM_GROUPS or name == "lora"]:
        groups = ", ".join(name for name in PARAM_GROUPS if name != "lora")
        raise ValueError(f"--lora_modules_to_save {unknown[0]}: is no group of parameters ({groups})")
    frozen = {}
    for group, row in PARAM_GROUPS.items():
        flags = [f"--{flag}" for flag in row.freeze if getattr(args, flag)]
        if args.lora_enable and group not in ("lora", *saved):
            flags.append("--lora_enable")
        if _rate(group, args, lr) == 0:
            flags.append("a learning rate of 0")
        if flags:
            frozen[group] = flags[0]
    return frozen


@torch.no_grad()
def keep_frozen_in(model: nn.Module, dtype: torch.dtype) -> None:
    """Let frozen parameters lie in `dtype`; the model is on the meta device."""
    for p in model.parameters():
        if not p.requires_grad:
            p.data = p.data.to(dtype)


@contextmanager
def frozen_stay(model: nn.Module, *, check: bool) -> Iterator[None]:
    """Make sure that what is frozen has the same bytes after the block as before it, on this rank.

    Args:
        model: after sharding and loading.
        check: `--validate_freezing`; without it nothing is done.

    Raises:
        AssertionError: naming a parameter that changed.
    """
    frozen = {n: p for n, p in model.named_parameters() if check and not p.requires_grad}
    before = {n: _fingerprint(p) for n, p in frozen.items()}
    yield
    changed = [n for n, p in frozen.items() if _fingerprint(p) != before[n]]
    assert not changed, f"{len(changed)} frozen parameters changed, first {changed[0]}"


@torch.no_grad()
def _fingerprint(p: Tensor) -> bytes:
    values = local(p).detach().to("cpu").contiguous().view(torch.uint8)
    return hashlib.blake2b(values.numpy().data).digest()


def optimizer_groups(
    model: nn.Module, args: ParamArgs, lr: float, scale: float = 1.0, *, matrices: bool = False
) -> list[dict[str, object]]:
    """The trainable parameters by group, as `train.optim.build_optimizer` takes them; empty groups are left out.

    Args:
        model: after freezing.
        args: what is trained.
        lr: `--lr`.
        scale: of every rate (`lr_scale`).
        matrices: tell what Muon moves (`by_muon`) from the rest.

    Returns:
        each with `name`, `params`, `peak_lr` and whether it is of `matrices`. With `--no_decay_norm_bias` a group may be there
        once more, with `weight_decay` 0.

    Raises:
        ValueError: if a trainable parameter is in no group.
    """
    members: dict[tuple[str, bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            spared = args.no_decay_norm_bias and is_spared_decay(name, p)
            apart = matrices and by_muon(name, p)
            members.setdefault((_require_group(name), spared, apart), []).append(p)
    return [
        {
            "name": group,
            "params": members[group, spared, apart],
            "peak_lr": _rate(group, args, lr) * scale,
            "matrices": apart,
            **({"weight_decay": 0.0} if spared else {}),
        }
        for group in PARAM_GROUPS
        for spared in (False, True)
        for apart in (False, True)
        if (group, spared, apart) in members
    ]


def by_muon(name: str, p: Tensor) -> bool:
    """Whether Muon moves a parameter: a matrix with both sides of `MIN_SIDE` or more, no embeddings and no output layer."""
    return (
        p.ndim == 2
        and min(p.shape) >= MIN_SIDE
        and EMBEDDING.search(name) is None
        and group_of(name) != "embeddings"
    )


def is_spared_decay(name: str, p: Tensor) -> bool:
    """Whether `--no_decay_norm_bias` leaves a parameter out: vectors (norms, biases) and tables of embeddings."""
    return p.ndim < 2 or EMBEDDING.search(name) is not None


def lr_scale(args: ParamArgs, tokens_per_step: int) -> float:
    """What `--auto_scale_lr` multiplies every rate with, 1 without it.

    Args:
        args: rule and reference.
        tokens_per_step: expected, over all ranks and micro-batches.

    Raises:
        ValueError: if there is nothing to compare with.
    """
    if not args.auto_scale_lr:
        return 1.0
    if not args.lr_reference_batch_size:
        raise ValueError(
            f"--auto_scale_lr needs --lr_reference_batch_size: the tokens per step that the rates were chosen for (now "
            f"{tokens_per_step:,})"
        )
    ratio = tokens_per_step / args.lr_reference_batch_size
    return args.packed_lr_factor * (math.sqrt(ratio) if args.lr_scale_rule == "sqrt" else ratio)


def describe(
    model: nn.Module,
    args: ParamArgs,
    lr: float,
    scale: float = 1.0,
    beside: Mapping[str, tuple[int, str]] | None = None,
) -> str:
    """A table for people: group, parameters, learning rate or what freezes it.

    Args:
        model: after freezing.
        args: what is trained.
        lr: `--lr`.
        scale: see `optimizer_groups`; rates are shown without and with it if it is not 1.
        beside: what is used and is no parameter of the model: name -> (numbers, what they are).
    """
    counts: dict[tuple[str, bool], int] = {}
    for name, p in model.named_parameters():
        key = (group_of(name) or "(fixed tables)", p.requires_grad)
        counts[key] = counts.get(key, 0) + p.numel()
    frozen = frozen_groups(args, lr)
    head = "learning rate" if scale == 1 else f"learning rate, as given -> times {scale:g}"
    lines = [f"{'group':<16}{'parameters':>16}  {head}"]
    for (group, trained), count in counts.items():
        rate = _rate(group, args, lr) if trained else 0.0
        shown = f"{rate:g}" if scale == 1 else f"{rate:g} -> {rate * scale:g}"
        why = f" ({frozen[group]})" if group in frozen else ""
        lines.append(f"{group:<16}{count:>16,}  {shown if trained else f'frozen{why}'}")
    lines += [f"{name:<16}{count:>16,}  {what}" for name, (count, what) in (beside or {}).items()]
    if args.freeze_und:
        lines.append(
            "freeze_und: no gradient passes the understanding tokens; what they alone use stays as it is"
        )
    trained_count = sum(count for (_, is_trained), count in counts.items() if is_trained)
    total = sum(counts.values()) + sum(count for count, _ in (beside or {}).values())
    return "\n".join(
        [*lines, f"{'trained':<16}{trained_count:>16,}  of {total:,} ({trained_count / total:.2%})"]
    )


def require_reached(args: ParamArgs, adapted: Collection[str]) -> None:
    """Stop over adapters in a group that a flag keeps as it is: one of the two was not meant.

    Args:
        args: what is trained.
        adapted: names of the matrices' parameters that get an adapter.

    Raises:
        ValueError: naming the flag.
    """
    for name in adapted:
        group = _require_group(name)
        also = ("freeze_und",) if group == "llm_und" else ()  # no gradient would reach it
        for flag in (*PARAM_GROUPS[group].freeze, *also):
            if getattr(args, flag):
                raise ValueError(
                    f"--{flag} True: keeps {name} as it is, but --lora_target puts an adapter there; leave one out"
                )


def _require_group(name: str) -> str:
    group = group_of(name)
    if group is None:
        raise ValueError(
            f"parameter {name} is to be trained but belongs to no group ({', '.join(PARAM_GROUPS)}); "
            "give it one in train/param_manager.py"
        )
    return group


def _rate(group: str, args: ParamArgs, lr: float) -> float:
    rates = (getattr(args, flag) for flag in PARAM_GROUPS[group].lr)
    return next((rate for rate in rates if rate is not None), lr)
