"""Which parameters belong together, which of them are trained, and at what rate.

A row of `PARAM_GROUPS` is all a new group needs, besides its `--freeze_x` and `--x_lr` in `train/args/params.py`. Call `freeze`
before sharding, `optimizer_groups` after it; both go by parameter names, which sharding leaves as they are.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping
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
        lr: flags of `ParamArgs` that give its learning rate; the first that is set counts, else `--lr`.
    """

    pattern: str
    freeze: tuple[str, ...] = ()
    lr: tuple[str, ...] = ()


PARAM_GROUPS: Mapping[str, ParamGroup] = {
    "embeddings": ParamGroup(
        pattern=r"language_model\.(model\.embed_tokens|lm_head)\.", freeze=("freeze_llm",), lr=("llm_lr",)
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
    "mask": ParamGroup(pattern=r"heads\.mask\.", freeze=("freeze_mask",), lr=("mask_lr",)),
}


def group_of(name: str) -> str | None:
    """Group that a parameter belongs to, None if no pattern matches."""
    return next((group for group, row in PARAM_GROUPS.items() if re.match(row.pattern, name)), None)


def freeze(model: nn.Module, args: ParamArgs) -> None:
    """Switch off the gradients of the groups that `args` keeps as they are.

    Raises:
        ValueError: if a trainable parameter is in no group, or nothing is left to train.
    """
    frozen = {group for group, row in PARAM_GROUPS.items() if any(getattr(args, flag) for flag in row.freeze)}
    for name, p in model.named_parameters():
        if p.requires_grad and _require_group(name) in frozen:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError(f"nothing is left to train: {', '.join(sorted(frozen))} are all frozen")


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


def optimizer_groups(model: nn.Module, args: ParamArgs, lr: float) -> list[dict[str, object]]:
    """The trainable parameters by group, as `train.optim.build_optimizer` takes them; empty groups are left out.

    Raises:
        ValueError: if a trainable parameter is in no group.
    """
    members: dict[str, list[nn.Parameter]] = {group: [] for group in PARAM_GROUPS}
    for name, p in model.named_parameters():
        if p.requires_grad:
            members[_require_group(name)].append(p)
    return [
        {"name": group, "params": params, "peak_lr": _peak_lr(group, args, lr)}
        for group, params in members.items()
        if params
    ]


def describe(model: nn.Module, args: ParamArgs, lr: float) -> str:
    """A table for people: group, parameters, learning rate or `frozen`."""
    counts: dict[tuple[str, bool], int] = {}
    for name, p in model.named_parameters():
        key = (group_of(name) or "(fixed tables)", p.requires_grad)
        counts[key] = counts.get(key, 0) + p.numel()
    lines = [f"{'group':<16}{'parameters':>16}  learning rate"]
    for (group, trained), count in counts.items():
        lines.append(f"{group:<16}{count:>16,}  {_peak_lr(group, args, lr) if trained else 'frozen'}")
    if args.freeze_und:
        lines.append(
            "freeze_und: no gradient passes the understanding tokens; what they alone use stays as it is"
        )
    total = sum(count for (_, is_trained), count in counts.items() if is_trained)
    return "\n".join([*lines, f"{'trained':<16}{total:>16,}  of {sum(counts.values()):,}"])


def _require_group(name: str) -> str:
    group = group_of(name)
    if group is None:
        raise ValueError(
            f"parameter {name} is to be trained but belongs to no group ({', '.join(PARAM_GROUPS)}); "
            "give it one in train/param_manager.py"
        )
    return group


def _peak_lr(group: str, args: ParamArgs, lr: float) -> float:
    rates = (getattr(args, flag) for flag in PARAM_GROUPS[group].lr)
    return next((rate for rate in rates if rate is not None), lr)
