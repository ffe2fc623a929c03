"""docs/fidelity.md: what it names is there, and each switch it calls golden is what makes a golden case agree."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.policy import PackBudget
from inference_pipeline.inferencer import AS_PUBLISHED, Prompt, Reading
from modeling.bagel.decode import PUBLISHED_RECIPES, DrawOptions
from tests.parity.kinds import inference, packing_policy, run_case, train_steps
from train.config import FLAGS

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent / "golden"
PAGE = (ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.split(" | ")] for line in PAGE.splitlines() if line.count(" | ") >= 4]

Patch = Callable[[pytest.MonkeyPatch], None]


def _reading(**changes: bool) -> Patch:
    return lambda patch: patch.setattr(inference, "AS_PUBLISHED", replace(AS_PUBLISHED, **changes))


def _drawing(**changes: bool) -> Patch:
    def apply(patch: pytest.MonkeyPatch) -> None:
        published = inference._options
        patch.setattr(inference, "_options", lambda params: replace(published(params), **changes))

    return apply


def _conserving(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        packing_policy, "PackBudget", lambda **values: PackBudget(**{**values, "policy": "conserving"})
    )


SWITCHES: dict[str, tuple[str, Patch]] = {
    "`--packer upstream_compat`": ("bagel_packer", _conserving),
    "`--loss_divisor micro_batch`": (
        "bagel_train_steps/constant_accum2",
        lambda patch: patch.setattr(train_steps, "DIVISOR", "step"),
    ),
    "`DrawOptions(renorm_whole_batch=True)`": (
        "bagel_inference/image_11_batch_global",
        _drawing(renorm_whole_batch=False),
    ),
    "`DrawOptions(taylorseer=True)`": ("bagel_inference/image_12_taylorseer", _drawing(taylorseer=False)),
    "`Reading(text_free_before=True)`": (
        "bagel_inference/e2e_04_interleaved",
        _reading(text_free_before=False),
    ),
    "`Reading(vae_resize_first=True)`": ("bagel_inference/e2e_01_edit", _reading(vae_resize_first=False)),
}
"""Switch as the page writes it -> a committed case that needs it, and how to run that case without."""


@pytest.mark.parametrize("switch", SWITCHES)
def test_a_golden_case_needs_the_switch(switch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case, without = SWITCHES[switch]
    assert agrees(GOLDEN / case)
    without(monkeypatch)
    assert not agrees(GOLDEN / case)


def agrees(case: Path) -> bool:
    try:
        return all(row.ok for row in run_case(case).rows)
    except StopIteration:  # other samples were chosen, and the recorded random numbers are used up
        return False


def test_every_switch_that_is_called_golden_is_tried() -> None:
    golden = {found for row in ROWS for found in re.findall(r"(`[^`]+`) \(golden\)", row[-1])}
    assert golden == set(SWITCHES)


def test_what_the_page_names_is_there() -> None:
    words = set(re.findall(r"`([^`]+)`", PAGE))
    missing = [w for w in words if "/" in w and w.endswith((".py", ".md")) and not (ROOT / w).is_file()]
    assert len(words) > 50 and not missing
    flags = {w.removeprefix("--").split()[0] for w in words if w.startswith("--")}
    assert flags and not flags - set(FLAGS)
    for row in ROWS[1:]:
        assert re.search(r"`[a-z0-9_]+/[a-z0-9_/]+\.py`", row[-2]) or row[-2] in ("where", "---"), row


def test_switches_in_python_can_be_written_as_they_stand() -> None:
    known = {"DrawOptions": DrawOptions, "Reading": Reading, "Prompt": Prompt}
    calls = [w for w in re.findall(r"`([^`]+\(.*?\))`", PAGE) if w.split("(")[0] in known]
    assert len(calls) >= 4
    for call in calls:
        eval(call, known)
    assert PUBLISHED_RECIPES["t2i"].timestep_shift == 3.0
