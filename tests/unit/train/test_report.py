"""Reports: a line for people, exact rows for machines, and a log that a resumed run continues."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from train.args import TrainArgs
from train.report import Reporter, StepReport, duration, progress_line, wandb_starter, window_means


def report(step: int, *, ce: float = 1.0, ce_count: float = 10.0, seconds: float = 0.5) -> StepReport:
    return StepReport(
        step=step,
        loss=ce + 2,
        losses={"ce": ce, "box_l1": 0.25},
        counts={"ce": ce_count, "box_l1": 0.0},
        lr={"llm_und": 1e-3, "vit": 1e-4},
        total_norm=0.5,
        tokens=1000,
        samples=5,
        seconds=seconds,
    )


def reporter(folder: Path, first_step: int = 0, **changes: object) -> Reporter:
    options = {"total_steps": 100, "log_every": 2, "tensorboard": False, "is_main": True, **changes}
    return Reporter(folder, first_step=first_step, **options)  # type: ignore[arg-type]


def test_means_weigh_by_count() -> None:
    means = window_means([report(1, ce=1.0, ce_count=10), report(2, ce=4.0, ce_count=30, seconds=1.5)])
    assert means["ce"] == pytest.approx(3.25)
    assert "box_l1" not in means  # nothing was counted: no value rather than a made-up one
    assert means["total_ce_tokens"] == 40
    assert (means["tokens_per_sec"], means["tokens_per_step"], means["total_samples"]) == (1000, 1000, 10)
    assert (means["lr"], means["lr_vit"]) == (1e-3, 1e-4)


def test_progress_line() -> None:
    window = [report(7)]
    line = progress_line(window, window_means(window), 2000, 200.0)
    assert line == (
        "step    7/2000 | loss 3.0000 | ce 1.0000 | lr 1.0e-03 norm 0.50 | 2.0k tok/s 10.0 samples/s | 3m20s left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (-3, "0s"), (59.2, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (356400, "4d03h")],
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_come_every_so_often_and_rows_every_step(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO), reporter(tmp_path) as r:
        for step in range(1, 6):
            r.step(report(step))
    assert [record.message[:13] for record in caplog.records] == ["step   2/100 ", "step   4/100 "]
    rows = [json.loads(line) for line in (tmp_path / "train_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert rows[0]["ce"] == 1.0
    assert "box_l1" not in rows[0]
    assert "step   4/100" in (tmp_path / "log.txt").read_text()


def test_a_resumed_run_drops_what_it_will_do_again(tmp_path: Path) -> None:
    with reporter(tmp_path) as r:
        for step in (1, 2, 3):
            r.step(report(step))
    log = tmp_path / "train_log.jsonl"
    log.write_text(log.read_text() + '{"step": 4, "lo')  # killed while writing
    with reporter(tmp_path, first_step=2) as r:
        r.step(report(3, ce=9.0))
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(row["step"], row["ce"]) for row in rows] == [(1, 1.0), (2, 1.0), (3, 9.0)]


def test_a_new_run_keeps_the_log_of_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with reporter(tmp_path) as first:
        first.step(report(1))
        first.validation(1, {"val/loss": 2.5, "val/seconds": 1.0, "val/a/ce": 3.0})
    with reporter(tmp_path) as second:
        second.step(report(1, ce=7.0))
    assert (
        "holds the log of an earlier run" in caplog.text
        and "train_log.1.jsonl, val_log.1.jsonl" in caplog.text
    )
    assert json.loads((tmp_path / "train_log.1.jsonl").read_text())["ce"] == 1.0
    assert json.loads((tmp_path / "val_log.1.jsonl").read_text()) == {
        "step": 1, "val/loss": 2.5, "val/seconds": 1.0, "val/a/ce": 3.0,
    }  # fmt: skip
    assert json.loads((tmp_path / "train_log.jsonl").read_text())["ce"] == 7.0
    caplog.clear()
    with reporter(tmp_path, first_step=1) as third:
        assert third.validations() == []
        third.validation(2, {"val/loss": 1.5})
    with reporter(tmp_path, first_step=2) as fourth, reporter(tmp_path, first_step=2, is_main=False) as other:
        assert fourth.validations() == [{"step": 2, "val/loss": 1.5}] and other.validations() == []
    assert "earlier run" not in caplog.text, "it is gone on with"


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    with reporter(tmp_path, is_main=False) as r:
        r.step(report(2))
        r.scalars(2, {"x": 1.0})
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_tags(tmp_path: Path) -> None:
    with reporter(tmp_path, tensorboard=True) as r:
        r.step(report(1))
        r.step(report(2))
        r.scalars(2, {"val/ce": 0.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "ce",
        "lr",
        "lr_vit",
        "total_norm",
        "tokens_per_sec",
        "total_ce_tokens",
        "total_samples",
        "val/ce",
    } <= tags
    assert [(event.step, event.value) for event in events.Scalars("ce")] == [(2, 1.0)]


def test_mfu_is_shown_where_the_peak_is_known() -> None:
    # 4e12 operations in 2 s on devices that can do 10 TFLOP/s together: 2 of 10.
    window = [replace(report(step, seconds=1.0), flops=2e12, peak_tflops=10.0) for step in (1, 2)]
    means = window_means(window)
    assert (means["actual_tflops"], means["mfu"]) == (2.0, 0.2)
    assert "| MFU 20.0% | 5s left" in progress_line(window, means, 9, 5.0)
    unknown = [replace(r, peak_tflops=0.0) for r in window]
    assert window_means(unknown)["actual_tflops"] == 2.0 and "mfu" not in window_means(unknown)
    assert "MFU" not in progress_line(unknown, window_means(unknown), 9, 5.0)


class FakeWandb(ModuleType):
    """Takes down what is sent to Weights & Biases."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.settings: dict[str, object] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []
        self.finished = False

    def init(self, **settings: object) -> "FakeWandb":
        self.settings = settings
        return self

    def Image(self, pixels: np.ndarray) -> tuple[int, ...]:
        return pixels.shape

    def log(self, values: dict[str, float], step: int) -> None:
        self.rows.append((step, values))

    def finish(self) -> None:
        self.finished = True


def test_weights_and_biases_gets_what_tensorboard_gets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    args = TrainArgs(
        enable_wandb=True, wandb_project="p", wandb_name="n", wandb_runid="7", wandb_offline=True
    )
    with reporter(tmp_path, wandb=wandb_starter(args, {"lr": 1e-4})) as r:
        r.step(report(1))
        r.step(report(2))
        r.image(2, "val/draw", np.zeros((4, 6, 3), dtype=np.uint8))
    assert fake.settings == {
        "project": "p", "name": "n", "id": "n-run7", "resume": "allow", "mode": "offline", "config": {"lr": 1e-4},
    }  # fmt: skip
    (step, values), shown = fake.rows
    assert shown == (2, {"val/draw/samples": (4, 6, 3)})
    assert step == 2 and values["ce"] == 1.0 and fake.finished


def test_nothing_is_sent_without_being_asked_and_a_missing_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert wandb_starter(TrainArgs(wandb_name="n"), {}) is None
    with pytest.raises(ImportError, match="--enable_wandb needs wandb, which is not installed"):
        wandb_starter(TrainArgs(enable_wandb=True), {})


def test_other_ranks_start_no_run(tmp_path: Path) -> None:
    def refuse() -> None:
        raise AssertionError("only rank 0 may")

    with reporter(tmp_path, is_main=False, wandb=refuse):
        pass


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write here .* --results_dir"):
        reporter(tmp_path / "file" / "results")
