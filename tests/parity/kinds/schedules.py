"""Learning-rate schedules and the moving average of the weights."""

import json
from pathlib import Path

import torch
from torch import nn

from tests.parity.comparison import Comparison
from train.args import OptimArgs
from train.ema import Ema
from train.optim import lr_factor

TOLERANCE = 1e-6


def run(folder: Path) -> Comparison:
    """Every learning rate of every schedule, every average after every update."""
    facts = json.loads((folder / "schedulers.json").read_text())
    found = Comparison()
    for i, case in enumerate(facts["schedules"]):
        args = OptimArgs(
            lr=case["peak_lr"],
            lr_scheduler=case["kind"],
            warmup_steps=case["warmup_steps"],
            total_steps=case.get("total_steps", 500_000),
            min_lr=case.get("min_lr", 0.0),
        )
        ours = torch.tensor(
            [case["peak_lr"] * lr_factor(step, args) for step in case["steps"]], dtype=torch.float64
        )
        theirs = torch.tensor(case["lr"], dtype=torch.float64)
        found.close(f"{case['kind']}.{i}", ours, theirs, TOLERANCE)
    for i, case in enumerate(facts["ema"]["cases"]):
        weights = nn.ParameterList(nn.Parameter(torch.tensor(v)) for v in case["initial_ema"])
        for weight, trains in zip(weights, case["requires_grad"], strict=True):
            weight.requires_grad_(trains)
        ema = Ema(weights, case["decay"])
        kept = [w.detach().clone() for w in weights]
        for step, (values, averages) in enumerate(
            zip(case["model_params_per_update"], case["ema_after_each_update"], strict=True)
        ):
            with torch.no_grad():
                for weight, value in zip(weights, values, strict=True):
                    weight.copy_(torch.tensor(value))
            ema.update(step)
            for j, theirs in enumerate(averages):
                ours = ema.averages.get(str(j), kept[j])  # what does not train keeps its first value
                found.close(f"ema.{i}/update{step}/{j}", ours, torch.tensor(theirs), TOLERANCE)
    return found
