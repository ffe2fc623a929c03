"""A step whose loss or gradient is not finite: which samples did it, what is kept of them, and what becomes of the rest.

Every sample's losses are known one by one, so a NaN is put down to the sample it came from, not to its pack. With
`--on_nonfinite stop` the run ends with a line that names it. With `skip` the weights stay as they are, the step counts as done,
and its samples are written off as rejected: `not_finite` those that did it, `beside_not_finite` those that were in the same
step and are not to blame. So `read = trained + waiting + rejected` goes on to hold.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from data.ledger import BESIDE_NOT_FINITE, NOT_FINITE, sample_amounts
from data.types import PackedBatch, Reject

DIRECTORY = "nonfinite"
"""In `--results_dir`: the packs of such steps."""
MAX_IN_A_ROW = 10
"""So many skipped steps one after the other end the run: what is wrong is not one sample."""


class NotFinite(ValueError):
    """The run ends for a step that is not finite; the weights are those from before it."""


def blame(names: Sequence[str], each: Tensor) -> dict[int, tuple[str, ...]]:
    """Places of the samples of a pack whose losses are not finite, and which losses.

    Args:
        names: of the `k` losses.
        each: `k s`, what every sample adds to every loss.
    """
    bad = (~each.isfinite()).T.tolist()
    return {
        place: tuple(name for name, is_bad in zip(names, row, strict=True) if is_bad)
        for place, row in enumerate(bad)
        if any(row)
    }


def tell(pack: PackedBatch, blamed: Mapping[int, Sequence[str]]) -> Iterator[str]:
    """A line per blamed sample."""
    for place, losses in blamed.items():
        o = pack.origins[place]
        yield f"{', '.join(losses)} of group {o.group!r}, {o.where} (lane {o.lane}, position {o.position})"


def write_off(pack: PackedBatch, blamed: Mapping[int, Sequence[str]]) -> list[Reject]:
    """The samples of a pack that nothing was learnt from."""
    rows = []
    for place, (origin, amount) in enumerate(zip(pack.origins, sample_amounts(pack), strict=True)):
        is_bad = place in blamed
        why = (
            f"{', '.join(blamed[place])} not finite" if is_bad else "in a step with a loss that is not finite"
        )
        rows.append(
            Reject(
                group=origin.group,
                position=origin.position,
                where=origin.where,
                reason=NOT_FINITE if is_bad else BESIDE_NOT_FINITE,
                message=f"{origin.where}: {why}",
                amount=amount,
            )
        )
    return rows


def keep_packs(
    results_dir: Path,
    step: int,
    rank: int,
    packs: Sequence[PackedBatch],
    blamed: Sequence[Mapping[int, object]],
) -> Path:
    """Write a rank's packs of a step: `STEP.RANK.safetensors` has the tensors, `STEP.RANK.json` who they are.

    Returns:
        the tensors' file.
    """
    folder = results_dir / DIRECTORY
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for i, pack in enumerate(packs):
        tensors.update(
            {f"{i}.{name}": x for name in pack.__slots__ if isinstance(x := getattr(pack, name), Tensor)}
        )
        for name in ("gen_pixels", "und_views"):
            tensors.update({f"{i}.{name}.{n}": x for n, x in enumerate(getattr(pack, name))})
        for head, region in pack.regions.items():
            tensors.update({f"{i}.{head}.{name}": getattr(region, name) for name in region.__slots__})
    file = folder / f"{step:07d}.{rank}.safetensors"
    save_file({name: x.detach().cpu().contiguous() for name, x in tensors.items()}, file)
    about = [
        {
            "sample_lens": pack.sample_lens,
            "split_lens": pack.split_lens,
            "split_modes": pack.split_modes,
            "split_branches": pack.split_branches,
            "origins": [asdict(o) for o in pack.origins],
            "not_finite": bad,
        }
        for pack, bad in zip(packs, blamed, strict=True)
    ]
    file.with_suffix(".json").write_text(json.dumps(about, ensure_ascii=False, indent=1), encoding="utf-8")
    return file
