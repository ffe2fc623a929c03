import itertools
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pytest

from data.dataset_base import DropoutSpec
from data.ledger import accounts, add_amounts, count_trained
from data.loader import build_loader
from data.order import lanes_of
from data.policy import PackBudget
from data.sources import SourceLost
from data.stream import StreamPlan
from data.transport import Slots
from data.types import LaneCursor
from tests.unit.data.toy_groups import LAYOUT, SPECIAL, fingerprint, group, lengths, mixed_groups

LANES = 8


def loader(groups=None, **changes):
    settings = {
        "groups": groups or mixed_groups(),
        "layout": LAYOUT,
        "special": SPECIAL,
        "seed": 3,
        "budget": PackBudget(expected=90, maximum=100, per_sample=100, max_buffer=8),
        "dropout": DropoutSpec(vae=0.3),
        "num_lanes": LANES,
    }
    given = {**settings, **changes}
    names = {f.name for f in fields(StreamPlan)}
    plan = StreamPlan(**{n: tuple(v) if n == "groups" else v for n, v in given.items() if n in names})
    return build_loader(plan, **{n: v for n, v in given.items() if n not in names})


def prints(packs, count):
    return [fingerprint(b) for b in itertools.islice(packs, count)]


@pytest.fixture(scope="module")
def single():
    """The first packs of a run on one rank without workers."""
    return prints(loader(), 48)


def rounds(world_size, count, **changes):
    """Packs of all ranks in the order of the run."""
    ranks = [loader(rank=r, world_size=world_size, **changes) for r in range(world_size)]
    return [next(ranks[p % world_size]) for p in range(count)]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_the_order_does_not_depend_on_the_world_size(world_size, single):
    assert [fingerprint(b) for b in rounds(world_size, 48)] == single


@pytest.mark.parametrize("num_workers", [1, 3])
def test_the_order_does_not_depend_on_the_workers(num_workers, single):
    assert prints(loader(num_workers=num_workers), 24) == single[:24]


def cursors_after(packs):
    """What a checkpoint holds after these packs."""
    cursors = {lane: LaneCursor(lane=lane) for lane in range(LANES)}
    for p, batch in enumerate(packs):
        assert batch.cursor.lane == p % LANES
        cursors[batch.cursor.lane] = batch.cursor
    return [cursors[lane] for lane in range(LANES)]


@pytest.mark.parametrize(
    "consumed, before, after", [(12, 1, 4), (12, 4, 2), (4, 2, 1), (20, 4, 1), (16, 2, 8)]
)
def test_a_run_goes_on_at_another_world_size(consumed, before, after, single):
    packs = rounds(before, consumed)
    cursors = cursors_after(packs)
    trained: dict = {}
    for batch in packs:
        add_amounts(trained, count_trained(batch))
    assert all(a.is_lawful for a in accounts(cursors, trained).values())
    again = rounds(after, 16, cursors=cursors, packs_consumed=consumed)
    assert [fingerprint(b) for b in again] == single[consumed : consumed + 16]


def test_a_run_goes_on_with_workers(single):
    cursors = cursors_after(itertools.islice(loader(), 13))
    assert prints(loader(cursors=cursors, packs_consumed=13, num_workers=2), 12) == single[13:25]


def test_more_workers_than_records(single):
    tiny = (group("tiny", [20, 30, 40]),)
    assert prints(loader(tiny, num_workers=2), 10) == prints(loader(tiny), 10)


@pytest.mark.parametrize("world_size", [3, 5, 7])
def test_any_number_of_ranks_reads_on_from_any_number(world_size, single, caplog):
    """Where ranks own different numbers of lanes, the lanes' own packs are still the same ones."""
    packs = rounds(2, 11)  # amid a round
    more = rounds(world_size, 20, cursors=cursors_after(packs), packs_consumed=11)
    assert "do not own equally many of 8 lanes" in caplog.text
    by_lane = {lane: [p for p in [*packs, *more] if p.cursor.lane == lane] for lane in range(LANES)}
    assert sum(map(len, by_lane.values())) == 31
    for lane, own in by_lane.items():
        assert [p.cursor.packs for p in own] == list(range(1, len(own) + 1))
        assert [fingerprint(p) for p in own] == single[lane::LANES][: len(own)]


def test_ranks_without_a_lane_are_refused():
    assert [len(lanes_of(r, 5, 8)) for r in range(5)] == [2, 2, 2, 1, 1]
    with pytest.raises(
        ValueError, match="8 lanes cannot be dealt to 9 ranks: each needs one; .* --num_lanes"
    ):
        loader(world_size=9)


def test_cursors_that_do_not_belong_to_the_step_are_refused():
    fresh = [LaneCursor(lane=lane) for lane in range(LANES)]
    with pytest.raises(ValueError, match="set --num_lanes 7, not 8"):
        loader(cursors=fresh[:-1])
    with pytest.raises(ValueError, match="stand at 0 packs, the run at 2: .* do not belong to its step"):
        loader(cursors=fresh, packs_consumed=2)


def test_a_pack_travels_as_few_bytes():
    batch = next(loader())
    tensors = []
    batch.map(lambda t: tensors.append(t.nbytes) or t)
    assert Slots(1).put(batch).num_bytes < sum(tensors) + 12_000


def bad_group(fault):
    numbers = lengths(40, 20, 40)
    numbers[:20] = [-1] * 20
    return (group("good", lengths(50, 5, 30)), group("bad", numbers, fault=fault))


def fail(num_workers, fault):
    with pytest.raises((ValueError, RuntimeError, ZeroDivisionError)) as caught:
        list(itertools.islice(loader(bad_group(fault), num_workers=num_workers), 200))
    return caught.value


def test_bad_data_stops_the_trainer_with_the_same_line_with_and_without_workers():
    alone, worker = fail(0, "skip"), fail(2, "skip")
    assert str(worker) == str(alone)
    assert isinstance(worker, ValueError)
    assert "\n" not in str(worker)
    assert str(worker).startswith(
        "group 'bad': 1 record could not be used, the limit is 0; first: toy.jsonl:"
    )
    assert "in next_pack" in worker.__notes__[0]


def test_an_error_in_a_worker_reaches_the_trainer():
    error = fail(1, "bug")
    assert str(error) == "data worker: ZeroDivisionError: no such thing"


@pytest.mark.parametrize("num_workers", [0, 1])
def test_lost_data_is_no_reject_and_known_as_what_it_is(num_workers):
    error = fail(num_workers, "lost")
    assert type(error) is SourceLost
    assert str(error) == "toy.jsonl: cannot be read any more"


@pytest.mark.timeout(60)
def test_a_dead_worker_does_not_hang():
    assert "a data worker died" in str(fail(1, "die"))


@pytest.mark.timeout(120)
def test_a_worker_that_hangs_loses_its_data():
    groups = bad_group("hang")
    with pytest.raises(
        SourceLost, match=r"data worker [01] of rank 0 .* nothing for 2 s; it was at toy.jsonl:\d+: see"
    ):
        list(itertools.islice(loader(groups, num_workers=2, worker_timeout_s=2), 200))


TRAINER = """
import multiprocessing
import time
from tests.unit.data.test_loader import loader

if __name__ == "__main__":
    packs = loader(num_workers=2)
    next(packs)
    print(*[w.pid for w in multiprocessing.active_children()], flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(60)
def test_a_killed_trainer_leaves_no_worker_behind(tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    root = Path(__file__).parents[3]
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, env={"PYTHONPATH": str(root)}
    ) as trainer:
        workers = [int(pid) for pid in trainer.stdout.readline().split()]
        assert len(workers) == 2 and all(is_running(pid) for pid in workers)
        trainer.kill()
    deadline = time.monotonic() + 20
    while any(is_running(pid) for pid in workers):
        assert time.monotonic() < deadline, "a worker outlives its trainer"
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_a_folder_called_data_where_the_program_is_started_is_not_the_package(tmp_path: Path) -> None:
    """Datasets lie in such folders. The server that workers are forked from begins with the working directory alone."""
    (tmp_path / "data").mkdir()
    program = """
import os, sys
sys.path.insert(0, sys.argv[1])
from data.processes import fork_server
from data.order import lanes_of
before = dict(os.environ)
worker = fork_server(["data.order"]).Process(target=lanes_of, args=(0, 1, 2))
assert dict(os.environ) == before
worker.start()
worker.join()
sys.exit(worker.exitcode)
"""
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", program, str(root)], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
