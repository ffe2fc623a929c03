"""A data worker that hangs: the trainer says which and what it was reading, within a bounded time, and ends it."""

import multiprocessing
import os
import signal
import time

import pytest
from torch.utils.data import DataLoader, IterableDataset

from data.doing import Doing, at_file, at_record
from data.processes import fork_server
from data.sources import SourceLost
from data.watch import poll_s, watched


class Sender(IterableDataset):
    """Sends numbers; at some of them it does what its test wants."""

    def __init__(self, doing: Doing, at: dict[int, str]):
        self.doing, self.at = doing, at

    def __iter__(self):
        self.doing.begin()
        for number in range(6):
            at_record(f"numbers.jsonl:{number}")
            at_file("/data/numbers.bin")
            what = self.at.get(number)
            if what == "hang":
                time.sleep(600)
            if what == "stop":  # not even its other threads run: a page fault on a dead disk
                os.kill(os.getpid(), signal.SIGSTOP)
            if what == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "work":  # long, but it gets on
                for part in range(8):
                    time.sleep(0.5)
                    at_file(f"/data/part-{part}")
            yield number


def received(at: dict[int, str], timeout_s: float) -> tuple[list[int], Doing]:
    context = fork_server(["torch"])
    doing = Doing(context)
    loader = DataLoader(
        Sender(doing, at),
        batch_size=None,
        num_workers=1,
        timeout=poll_s(timeout_s),
        multiprocessing_context=context,
    )
    got: list[int] = []
    try:
        got.extend(watched(iter(loader), doing, timeout_s, "data worker 1 of rank 3"))
    except (SourceLost, RuntimeError) as e:
        e.got = got  # type: ignore[attr-defined]
        raise
    return got, doing


def test_a_worker_that_gets_on_is_waited_for():
    got, doing = received({2: "work"}, timeout_s=2.5)  # which takes 4 s
    assert got == list(range(6)) and doing.text == "numbers.jsonl:5, reading /data/numbers.bin"


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_a_worker_that_hangs_is_named_with_what_it_reads_and_ended(how):
    with pytest.raises(SourceLost) as e:
        received({3: how}, timeout_s=1)
    # What was made before is given out, but for what a stopped process has not yet sent.
    assert e.value.got == [0, 1, 2] if how == "hang" else e.value.got in ([], [0], [0, 1], [0, 1, 2])
    text, pid = str(e.value), int(str(e.value).partition("(process ")[2].partition(")")[0])
    assert (
        text.startswith("data worker 1 of rank 3 (process ")
        and "has done nothing for 1 s; it was at " in text
    )
    assert "it was at numbers.jsonl:3, reading /data/numbers.bin: " in text and "--worker_timeout_s" in text
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{pid}")


def test_a_worker_that_dies_is_noticed_before_it_counts_as_hanging():
    with pytest.raises(RuntimeError, match="(exited unexpectedly|killed by signal)"):
        received({1: "die"}, timeout_s=3600)


def test_telling_does_nothing_where_nobody_looks():
    at_record("x")
    at_file("y")
    doing = Doing(multiprocessing.get_context("forkserver"))
    assert (doing.count, doing.pid, doing.text) == (0, 0, "")
    doing.tell("ü" * 5000)
    assert doing.count == 1 and set(doing.text.rstrip("\ufffd")) == {"ü"} and len(doing.text) > 1000
