"""A few optimizer updates: normalisation of the losses, accumulation, clipping, AdamW, schedule, moving average."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.parity.comparison import Comparison
from tests.parity.kinds.models import build_model, flow_of, pack_of
from train.args import OptimArgs
from train.ema import Ema
from train.objective import Divisor, Objective, divisors
from train.optim import build_optimizer, set_learning_rates

TOLERANCE = 1e-4
DIVISOR: Divisor = "micro_batch"


def run(folder: Path) -> Comparison:
    """Losses of every micro-batch, norm and learning rate of every update, parameters and averages at the end.

    The published loop divides each micro-batch's loss by that micro-batch's own count: `--loss_divisor micro_batch`.
    """
    case = json.loads((folder / "inputs.json").read_text())
    facts = json.loads((folder / "expected.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    inputs, expected = (load_file(folder / f"{n}.safetensors") for n in ("inputs", "expected"))
    hyper = case["hyper"]
    model = build_model(config, load_file(folder / "weights.safetensors"))
    args = OptimArgs(**{k: hyper[k] for k in OPTIM if k in hyper})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer([{"name": "all", "params": params, "peak_lr": args.lr}], args)
    ema = Ema(model, hyper["ema"])
    found = Comparison()
    accumulation = hyper["gradient_accumulation_steps"]
    ce_name = "ce_reweighted" if hyper["ce_loss_reweighting"] else "ce"
    objective = Objective.build({ce_name: hyper["ce_weight"], "mse": hyper["mse_weight"]}, {})
    for update, theirs in enumerate(facts["updates"]):
        steps = range(update * accumulation, (update + 1) * accumulation)
        names = [case["micro_batches"][step] for step in steps]
        tensors = [
            {k.removeprefix(f"{name}/"): v for k, v in inputs.items() if k.startswith(f"{name}/")}
            for name in names
        ]
        batches = [
            pack_of(t, case["batches"][name], model.config, config["timestep_shift"])
            for name, t in zip(names, tensors, strict=True)
        ]
        counts = torch.stack([objective.counts(b) for b in batches])
        for step, t, batch, count, divisor in zip(
            steps, tensors, batches, counts, divisors(counts, DIVISOR), strict=True
        ):
            flow = flow_of(t, inputs[f"noise.{step}"], batch, model.config)
            terms = objective.terms(model(batch, flow.noised), batch, flow)
            loss = objective.scalar(terms, divisor)
            loss.backward()
            ours = {
                "ce": terms[0].total / count[0],
                "mse": terms[1].total / count[1],
                "loss": loss * accumulation,
            }
            for key, value in ours.items():
                found.close(
                    f"step{step}/{key}",
                    value.detach(),
                    torch.tensor(facts["micro_steps"][step][key], dtype=value.dtype),
                    TOLERANCE,
                )
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        lr = set_learning_rates(optimizer, update, args)["all"]
        optimizer.step()
        optimizer.zero_grad()
        ema.update(update)
        found.close(f"update{update}/lr", torch.tensor(lr), torch.tensor(theirs["lr"]), TOLERANCE)
        norm_before = torch.tensor(theirs["grad_norm_before_clip"])
        found.close(f"update{update}/grad_norm", norm, norm_before, TOLERANCE)
    parameters = dict(model.named_parameters())
    ours = {"param": parameters, "ema": {**parameters, **ema.averages}}  # what is frozen is not averaged
    for key, value in expected.items():
        kind, _, name = key.partition("/")
        value_of = ours[kind.removesuffix("_norm")][name].detach()
        found.close(key, value_of.norm().double() if kind.endswith("_norm") else value_of, value, TOLERANCE)
    return found


OPTIM = (
    "beta1",
    "beta2",
    "eps",
    "weight_decay",
    "max_grad_norm",
    "lr",
    "lr_scheduler",
    "warmup_steps",
    "total_steps",
    "min_lr",
)
