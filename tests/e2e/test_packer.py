"""`--packer upstream_compat` through the real trainer: what it loses is said and adds up, also in a resumed run."""

from pathlib import Path

import pytest

from tests.e2e.conftest import Quickstart
from tests.e2e.test_kill_and_resume import assert_finished
from tests.e2e.trainer import Done, run_trainer


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_what_was_lost_is_said_and_counted_on_after_a_resume(quickstart: Quickstart, tmp_path: Path) -> None:
    flags = {
        "dataset_config_file": quickstart.mixture,
        "model_path": quickstart.model,
        "results_dir": "results",
        "packer": "upstream_compat",
        "expected_num_tokens": 650,
        "max_num_tokens": 700,
        "max_buffer_size": 1,
        "prefer_buffer_before": 700,
        "auto_resume": True,
    }
    first = run_trainer(tmp_path, **{**flags, "total_steps": 2})
    assert_finished(first)
    done = run_trainer(tmp_path, **{**flags, "total_steps": 4})
    assert_finished(done)
    early, late = lost_of(first), lost_of(done)
    assert 0 < early < late, "counted over the whole run, not since it was resumed"


def lost_of(done: Done) -> int:
    """The ledger's last line, which has to add up, and the sentence at the end of the run."""
    ledger = done.lines("read = trained + waiting + rejected + lost: ")[-1].partition("lost: ")[2]
    lost = 0
    for entry in ledger.split(" | "):
        name_and_read, _, parts = entry.partition(" = ")
        numbers = [int(n) for n in parts.split(" + ")]
        assert int(name_and_read.split()[-1]) == sum(numbers)
        lost += numbers[-1]
    (said,) = done.lines("were lost by --packer upstream_compat")
    assert f" {lost} of " in said
    return lost
