"""How a step's packs are dealt to ranks and micro-batches changes nothing: the real model, objective and `training_step`.

Every case is compared with the same packs in one plain process, nothing sharded. Gradients are taken where the optimizer takes
them.
"""

import pytest
import torch

from tests.distributed.launch import run_distributed
from tests.distributed.tiny_run import EVERYTHING, Packs, Steps, train_steps, worst

TWO: Packs = (("see", "edit", "say"), ("draw", "say", "see"))
EIGHT: Packs = (
    ("see",),
    ("say", "draw"),
    ("edit", "say"),
    ("draw",),
    ("say",),
    ("see", "edit"),
    (),
    EVERYTHING,
)
TEXT_BESIDE_ALL: Packs = (("say", "say"), EVERYTHING)
NOTHING_BESIDE_ALL: Packs = ((), EVERYTHING)

PER_UNIT = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 0}
ROOT_ONLY = {"sharding_strategy": "FULL_SHARD", "min_unit_params": 10**9}
NUM_STEPS = 3

CASES: dict[str, tuple[Packs, dict[str, object]]] = {
    "sharded per unit": (TWO, PER_UNIT),
    "sharded as a whole": (TWO, {**ROOT_ONLY, "recompute": False}),
    "2 x 4 micro-batches": (EIGHT, PER_UNIT),
    "2 x 4 micro-batches, clipped": (EIGHT, {**PER_UNIT, "max_grad_norm": 0.5}),
    "text beside everything": (TEXT_BESIDE_ALL, PER_UNIT),
    "everything beside text": (TEXT_BESIDE_ALL[::-1], ROOT_ONLY),
    "nothing beside everything": (NOTHING_BESIDE_ALL, PER_UNIT),
    "nothing beside nothing": (((), ()), PER_UNIT),
}


@pytest.fixture(scope="module")
def on_two_ranks() -> dict[str, Steps]:
    """Every case, in one launch: starting processes costs more than training."""
    return run_distributed(all_cases, 2)[0]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.timeout(100)  # where a rank does not come to a collective, the launcher ends it after 60 s
def test_two_ranks_train_as_one_process(case: str, on_two_ranks: dict[str, Steps]) -> None:
    found, expected = on_two_ranks[case], train_steps(*CASES[case], steps=NUM_STEPS, sharded=False)
    # Worst measured, over all cases and with one and two threads: gradients 9.7e-7 of the tensor's largest entry, weights 1.4e-6
    # absolute (the three updates move them by 3e-3), losses 8.5e-7 and norms 3.6e-7 relative.
    assert worst(found.gradients, expected.gradients, relative=True) < 1e-5
    assert worst(found.weights, expected.weights, relative=False) < 1e-5
    for mine, other in zip(found.reports, expected.reports, strict=True):
        assert (mine.counts, mine.tokens, mine.samples) == (other.counts, other.tokens, other.samples)
        assert mine.losses == pytest.approx(other.losses, rel=1e-5)
        assert mine.total_norm == pytest.approx(other.total_norm, rel=1e-5)


def test_micro_batches_add_up_to_one_pack() -> None:
    """Nothing sharded on either side: eight packs of a step give the gradient of one pack with all their samples."""
    together = (tuple(name for names in EIGHT for name in names),)
    found, expected = (train_steps(packs, {}, steps=NUM_STEPS, sharded=False) for packs in (EIGHT, together))
    assert worst(found.gradients, expected.gradients, relative=True) < 1e-5  # worst measured: 1.6e-6


def test_micro_batches_are_averaged_on_request() -> None:
    """`--loss_divisor micro_batch`: a step's gradient is the mean of those of its packs."""
    found = train_steps(EIGHT, {"loss_divisor": "micro_batch"}, steps=NUM_STEPS, sharded=False).gradients
    each = [train_steps((names,), {}, steps=NUM_STEPS, sharded=False).gradients for names in EIGHT]
    mean = {name: torch.stack([g[name] for g in each]).mean(0) for name in found}
    assert worst(found, mean, relative=True) < 1e-5  # worst measured: 1.5e-7
    assert (
        worst(found, train_steps(EIGHT, {}, steps=NUM_STEPS, sharded=False).gradients, relative=True) > 1e-2
    )


def all_cases() -> dict[str, Steps]:
    return {name: train_steps(packs, flags, steps=NUM_STEPS) for name, (packs, flags) in CASES.items()}
