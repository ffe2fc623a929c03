"""One training forward and backward of the whole model on a packed batch."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from modeling.ops.flow import velocity_target
from tests.parity.comparison import Comparison
from tests.parity.kinds.models import build_model, flow_of, pack_of

TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 5e-5


def run(folder: Path) -> Comparison:
    """Hidden states, logits, losses, every gradient and every gradient's norm."""
    config = json.loads((folder / "config.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    expected = load_file(folder / "expected.safetensors")
    model = build_model(config, load_file(folder / "weights.safetensors"))
    shape = json.loads((folder / "inputs.json").read_text())
    batch = pack_of(inputs, shape, model.config, config["timestep_shift"])
    flow = flow_of(inputs, inputs.get("noise"), batch, model.config)
    out = model(batch, flow.noised)

    facts = json.loads((folder / "expected.json").read_text())
    found = Comparison()
    found.close("last_hidden_state", out.hidden, expected["last_hidden_state"], TOLERANCE)
    loss = torch.zeros(())
    ours: dict[str, Tensor] = {}
    if "ce" in expected:
        ce = F.cross_entropy(out.logits, batch.label_ids, reduction="none")
        found.close("ce_logits", out.logits, expected["ce_logits"], TOLERANCE)
        found.close("ce", ce, expected["ce"], TOLERANCE)
        ours["ce_mean"] = ce.mean()
        ours["ce_reweighted"] = (ce * batch.label_weight).sum() / batch.label_weight.sum()
        loss = loss + ce.mean()
    if "mse" in expected:
        target = velocity_target(flow.latents, flow.noise)
        mse = (out.velocity - target)[batch.gen_timestep > 0].square()
        found.close("mse", mse, expected["mse"], TOLERANCE)
        ours["mse_mean"], ours["mse_per_token_then_token_mean"] = mse.mean(), mse.mean(-1).mean()
        loss = loss + mse.mean()
    found.close("loss", loss, expected["loss"], TOLERANCE)
    loss.backward()

    rounding = set(facts.get("params_with_rounding_noise_grad", []))
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    ours["loss"] = loss
    ours["total_grad_norm"] = torch.stack([g.double().norm() for g in gradients.values()]).norm()
    for name, theirs in facts["scalars"].items():
        allowed = GRADIENT_TOLERANCE if name == "total_grad_norm" else TOLERANCE
        found.close(f"scalars/{name}", ours[name], torch.tensor(theirs, dtype=torch.float64), allowed)
    surplus = [n for n in facts["params_without_grad"] if n in gradients and gradients[n].any()]
    found.equal("params_without_grad", surplus, [])
    for key, value in expected.items():
        kind, _, name = key.partition("/")
        if kind not in ("grad", "grad_norm") or name in rounding:
            continue
        gradient = gradients.get(name, torch.zeros_like(value))  # a missing gradient is as good as a zero one
        if kind == "grad_norm":
            # Gradients below 1e-6 are zero up to rounding.
            norm, theirs = gradient.double().norm(), value.double()
            allowed = max(GRADIENT_TOLERANCE, 1e-6 / float(theirs.clamp(min=1e-30)))
            found.close(key, norm, theirs, allowed)
        else:
            found.close(key, gradient, value, GRADIENT_TOLERANCE)
    return found
