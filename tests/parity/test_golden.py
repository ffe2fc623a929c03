"""The published system's numbers on tiny models, number by number: the committed golden cases, and all where they lie beside."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.parity import run
from tests.parity.kinds import KINDS, NOT_BUILT, find_cases, kind_of, run_case

COMMITTED = Path(__file__).parent / "golden"
GOLDEN = next(folder for folder in (run.BESIDE, COMMITTED) if folder.is_dir())
CASES = [c for c in find_cases(GOLDEN) if c.name not in NOT_BUILT]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c.relative_to(GOLDEN)))
def test_same_numbers(case: Path) -> None:
    found = run_case(case)
    assert found.rows
    assert not [row for row in found.rows if not row.ok]


def test_every_kind_has_a_committed_case() -> None:
    assert {kind_of(case) for case in find_cases(COMMITTED)} == set(KINDS)


def test_one_changed_number_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = tmp_path / "rope2d"
    shutil.copytree(COMMITTED / "siglip_navit" / "rope2d", case)
    assert run.main([str(case)]) == 0
    expected = load_file(case / "expected.safetensors")
    expected["output"][3, 5] += 1e-3
    save_file(expected, case / "expected.safetensors")
    capsys.readouterr()
    assert run.main([str(case)]) == 1
    line = json.loads(capsys.readouterr().out)
    assert [output["name"] for output in line["outputs"] if not output["ok"]] == ["output"]


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(tmp_path / "nothing")]) == 2
    assert "not a golden case" in json.loads(capsys.readouterr().out)["error"]
