"""A few optimizer updates: normalisation of the losses, accumulation, clipping, AdamW, schedule, moving average."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from modeling.losses import LOSSES
from tests.parity.comparison import Comparison
from tests.parity.kinds.models import build_model, flow_of, pack_of
from train.config import OptimArgs
from train.ema import Ema
from train.optim import build_optimizer, set_learning_rates

TOLERANCE = 1e-4


def run(folder: Path) -> Comparison:
    """Losses of every micro-batch, norm and learning rate of every update, parameters and averages at the end.

    The published loop divides each micro-batch's loss by that micro-batch's own count; ours divides once per step. So the
    division stands here, and the rest is ours.
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
    found, updates = Comparison(), 0
    accumulation = hyper["gradient_accumulation_steps"]
    ce_name = "ce_reweighted" if hyper["ce_loss_reweighting"] else "ce"
    for step, name in enumerate(case["micro_batches"]):
        tensors = {k.removeprefix(f"{name}/"): v for k, v in inputs.items() if k.startswith(f"{name}/")}
        batch = pack_of(tensors, case["batches"][name], model.config, config["timestep_shift"])
        flow = flow_of(tensors, inputs[f"noise.{step}"], batch, model.config)
        output = model(batch, flow.noised)
        means = {
            n: LOSSES[loss].total(output, batch, flow) / LOSSES[loss].count(batch)
            for n, loss in (("ce", ce_name), ("mse", "mse"))
        }
        loss = means["ce"] * hyper["ce_weight"] + means["mse"] * hyper["mse_weight"]
        (loss / accumulation).backward()
        for key, value in {**means, "loss": loss}.items():
            theirs = torch.tensor(facts["micro_steps"][step][key])
            found.close(f"step{step}/{key}", value.detach(), theirs, TOLERANCE)
        if (step + 1) % accumulation:
            continue
        norm = torch.nn.utils.clip_grad_norm_(params, args.max_grad_norm)
        lr = set_learning_rates(optimizer, updates, args)["all"]
        optimizer.step()
        optimizer.zero_grad()
        ema.update(updates)
        theirs = facts["updates"][updates]
        found.close(f"update{updates}/lr", torch.tensor(lr), torch.tensor(theirs["lr"]), TOLERANCE)
        norm_before = torch.tensor(theirs["grad_norm_before_clip"])
        found.close(f"update{updates}/grad_norm", norm, norm_before, TOLERANCE)
        updates += 1
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
