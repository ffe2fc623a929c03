"""Kinds of golden cases: how a folder is recognised, and the function that runs it. A new kind is one file and one row here."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.parity.comparison import Comparison
from tests.parity.kinds import (
    forward,
    inference,
    navit,
    packer,
    packing_policy,
    schedules,
    train_steps,
    transforms,
    vae,
)

Run = Callable[[Path], Comparison]


def _inputs_have(key: str) -> Callable[[Path], bool]:
    def recognise(folder: Path) -> bool:
        file = folder / "inputs.json"
        return file.is_file() and key in json.loads(file.read_text())

    return recognise


def _has(name: str) -> Callable[[Path], bool]:
    return lambda folder: (folder / name).is_file()


def _is_autoencoder(folder: Path) -> bool:
    file = folder / "config.json"
    return (
        _has("weights.safetensors")(folder)
        and file.is_file()
        and "scale_factor" in json.loads(file.read_text())
    )


KINDS: dict[str, tuple[Callable[[Path], bool], Run]] = {
    "forward and gradients": (_inputs_have("mask_mode"), forward.run),
    "packing": (_inputs_have("data_config"), packer.run),
    "choice of samples": (_has("batch_policy.json"), packing_policy.run),
    "training steps": (_inputs_have("hyper"), train_steps.run),
    "inference": (_inputs_have("kind"), inference.run),
    "image transforms": (_has("resize_table.json"), transforms.run),
    "vision tower": (_has("weights_conv.safetensors"), navit.run),
    "autoencoder": (_is_autoencoder, vae.run),
    "schedules and averages": (_has("schedulers.json"), schedules.run),
}

NOT_BUILT = {
    "grounding": "the perception systems' cases have a format of their own and come with the heads they are about",
}
"""Cases, by the name of their folder, that describe what this project does not have, and why."""


def kind_of(folder: Path) -> str | None:
    """The kind of a case folder; None if it is none (or no kind that is built).

    Raises:
        ValueError: if a file that says so is no JSON.
    """
    return next((name for name, (recognise, _) in KINDS.items() if recognise(folder)), None)


def find_cases(root: Path) -> Iterator[Path]:
    """`root` and every folder below it that is a case, or whose files are too broken to tell, in order."""
    folders = sorted(p for p in root.rglob("*") if p.is_dir())
    return (f for f in [root, *folders] if _may_be_case(f))


def find_left_out(root: Path) -> Iterator[Path]:
    """The folders below `root` that are in `NOT_BUILT`."""
    return (p for p in sorted(root.rglob("*")) if p.is_dir() and p.name in NOT_BUILT)


def _may_be_case(folder: Path) -> bool:
    try:
        return kind_of(folder) is not None
    except ValueError:
        return True


def run_case(folder: Path) -> Comparison:
    """Compare one case.

    Raises:
        ValueError: if the folder is no case, or describes what is not built.
    """
    if folder.name in NOT_BUILT:
        raise ValueError(f"{folder}: not built: {NOT_BUILT[folder.name]}")
    kind = kind_of(folder)
    if kind is None:
        raise ValueError(f"{folder}: not a golden case; known kinds are {', '.join(KINDS)}")
    return KINDS[kind][1](folder)
