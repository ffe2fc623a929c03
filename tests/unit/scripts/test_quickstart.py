"""The quickstart's driver: stages are skipped, continued or done afresh, and a failure says where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import quickstart
from scripts.quickstart import NotOurs, Stage, StageFailed, run_stages

PLACES = {"python": sys.executable}


def _stages(run, second="pass", again=True):
    count = f"open(r'{run}/count', 'a').write('x')"
    return (
        Stage(name="first", steps=((f'{{python}} -c "{count}; print(1)"',),), writes=("made",)),
        Stage(
            name="second",
            steps=((f'{{python}} -c "{second}"', '{python} -c "print(2)"'),),
            writes=("made2",),
            again=again,
        ),
    )


@pytest.fixture(autouse=True)
def no_setup_time(monkeypatch):
    monkeypatch.delenv(quickstart.SETUP_SECONDS, raising=False)


def test_finished_stages_are_left_out(tmp_path, capfd, monkeypatch):
    monkeypatch.setenv(quickstart.SETUP_SECONDS, "12.5")
    seconds = run_stages(_stages(tmp_path), tmp_path, PLACES)
    again = run_stages(_stages(tmp_path), tmp_path, PLACES)
    assert list(seconds) == ["setup", "first", "second"] and seconds["setup"] == 12.5
    assert again == seconds
    assert (tmp_path / "count").read_text() == "x"
    assert capfd.readouterr().out.count("done before") == 2
    assert "1\n" in (tmp_path / "logs" / "first.log").read_text()


def test_other_commands_start_afresh_and_the_same_go_on(tmp_path):
    broken = _stages(tmp_path, second="raise SystemExit(3)")
    with pytest.raises(StageFailed) as failure:
        run_stages(broken, tmp_path, PLACES)
    assert failure.value.code == 3
    (tmp_path / "made2").mkdir()
    with pytest.raises(StageFailed):
        run_stages(broken, tmp_path, PLACES)
    assert (tmp_path / "made2").exists()  # the same work goes on with what it had
    run_stages(_stages(tmp_path), tmp_path, PLACES)
    assert not (tmp_path / "made2").exists()
    assert (tmp_path / "count").read_text() == "x"


def test_what_another_run_made_is_left_alone(tmp_path):
    broken = _stages(tmp_path, second="raise SystemExit(3)", again=False)
    with pytest.raises(StageFailed):
        run_stages(broken, tmp_path, PLACES)
    (tmp_path / "made2").mkdir()
    with pytest.raises(NotOurs, match="made2 was made by a quickstart with other settings"):
        run_stages(_stages(tmp_path, again=False), tmp_path, PLACES)
    assert (tmp_path / "made2").exists()


def test_what_somebody_else_made_is_left_alone(tmp_path):
    (tmp_path / "made").mkdir()
    with pytest.raises(NotOurs, match="made is there and was not made by this program; choose another"):
        run_stages(_stages(tmp_path), tmp_path, PLACES)
    assert (tmp_path / "made").exists() and not (tmp_path / "count").exists()


def test_the_number_of_processes_does_not_make_other_data(tmp_path):
    data = quickstart.stages(2)[0]
    places = {"run": "r", "seed": "0", "python": "python", "small_data": ""}
    few, many = (quickstart.fingerprint(data, {**places, "workers": n}, "") for n in ("2", "4"))
    assert few == many


def test_a_failure_names_the_log_shows_its_end_and_stops_the_others(tmp_path):
    stage = Stage(
        name="bad",
        steps=(
            ('{python} -c "print(987); raise ValueError(654)"', '{python} -c "import time; time.sleep(60)"'),
        ),
    )
    with pytest.raises(StageFailed) as failure:
        run_stages((stage,), tmp_path, PLACES)
    message = str(failure.value)
    assert "987" in message and "ValueError: 654" in message and str(tmp_path / "logs" / "bad.log") in message


def test_every_command_of_the_table_can_be_filled_in(tmp_path):
    places = {
        "run": str(tmp_path),
        "seed": "0",
        "nproc": "2",
        "workers": "2",
        "python": "python",
        "torchrun": "torchrun",
    }
    places |= {f"small_{stage}": "" for stage in quickstart.SMOKE}
    for stage in (*quickstart.stages(2), quickstart.REPORT):
        for step in stage.steps:
            for command in step:
                program = next(
                    word for word in command.format(**places).split() if word.endswith(".py") or "." in word
                )
                assert "{" not in command.format(**places), program
    assert len(quickstart.stages(3)[-1].steps[0]) == 3


def test_two_in_one_directory_are_refused(tmp_path):
    script = Path(quickstart.__file__)
    with quickstart.only_one(tmp_path):
        done = subprocess.run(
            [sys.executable, script, "--output_dir", tmp_path],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.returncode == 1 and "another quickstart is running" in done.stderr


def test_state_files_cut_short_count_as_absent(tmp_path):
    (tmp_path / "a").write_text('{"finger')
    assert quickstart.read_json(tmp_path / "a") == {} == quickstart.read_json(tmp_path / "b")
    quickstart.write_json(tmp_path / "a", {"x": 1})
    assert json.loads((tmp_path / "a").read_text()) == {"x": 1}
