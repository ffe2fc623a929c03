"""Muon: what the iteration does to a matrix, and that the update is the rule, step by step."""

import torch
from torch import Tensor, nn

from train.adamw import kept_of
from train.args import OptimArgs, ParamArgs
from train.muon import RMS, Muon, orthogonal
from train.optim import build_optimizer
from train.param_manager import by_muon, optimizer_groups


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_singular_values_go_to_one_and_singular_vectors_stay() -> None:
    for shape in ((96, 64), (64, 96), (64, 64)):
        u, s, v = torch.linalg.svd(random(*shape), full_matrices=False)
        # Spread over two orders of magnitude, as gradients' are.
        x = u * torch.logspace(0, -2, len(s)) @ v
        y = orthogonal(torch.stack([x, 3 * x]))
        torch.testing.assert_close(y[0], y[1], rtol=1e-4, atol=1e-4)
        inside = u.mT @ y[0] @ v.mT
        values = inside.diagonal()
        assert values.min() > 0.3 and values.max() < 1.25 and values[: len(s) // 2].min() > 0.6
        torch.testing.assert_close(inside - values.diag(), torch.zeros_like(inside), rtol=0, atol=1e-3)
    assert not orthogonal(torch.zeros(1, 64, 80)).any()


class Small(nn.Module):
    """Names as in the real model, so that the groups are."""

    def __init__(self) -> None:
        super().__init__()
        self.connector = nn.Linear(64, 80)
        self.vae2llm = nn.Linear(64, 16)


def test_matrices_go_by_the_rule_and_all_else_by_adamw() -> None:
    torch.manual_seed(0)
    model, beside = Small(), Small()
    beside.load_state_dict(model.state_dict())
    args = OptimArgs(lr=0.01, optimizer="muon", muon_momentum=0.9, weight_decay=0.1)
    optimizer = build_optimizer(optimizer_groups(model, ParamArgs(), args.lr, matrices=True), args)
    assert isinstance(optimizer, Muon)
    assert [(g["name"], g["matrices"], len(g["params"])) for g in optimizer.param_groups] == [
        ("connector", False, 1),
        ("connector", True, 1),
        ("flow", False, 2),
    ]
    adamw = build_optimizer(
        optimizer_groups(beside, ParamArgs(), args.lr), OptimArgs(lr=0.01, weight_decay=0.1)
    )
    weight, momentum = model.connector.weight.detach().clone(), torch.zeros(80, 64)
    for step in range(3):
        for (name, p), q in zip(model.named_parameters(), beside.parameters(), strict=True):
            p.grad = random(*p.shape, seed=100 * step + len(name))
            q.grad = p.grad.clone()
        gradient = model.connector.weight.grad
        assert gradient is not None
        momentum = 0.9 * momentum + 0.1 * gradient
        direction = orthogonal((0.1 * gradient + 0.9 * momentum)[None])[0]
        weight = weight * (1 - 0.01 * 0.1) - 0.01 * RMS * 80**0.5 * direction
        optimizer.step()
        adamw.step()
        torch.testing.assert_close(model.connector.weight, weight, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        if name != "connector.weight":
            assert torch.equal(p, beside.get_parameter(name)), name
    # The size of a step is AdamW's: about 0.2 learning rates in the root mean square.
    assert 0.15 < float(direction.square().mean().sqrt()) * RMS * 80**0.5 < 0.25


def test_one_moment_is_kept_of_a_matrix_and_two_of_all_else() -> None:
    model = Small()
    args = OptimArgs(optimizer="muon")
    optimizer = build_optimizer(optimizer_groups(model, ParamArgs(), args.lr, matrices=True), args)
    kept = {
        id(p): set(kept_of(optimizer, group, p)) for group in optimizer.param_groups for p in group["params"]
    }
    assert kept[id(model.connector.weight)] == {"exp_avg"}
    assert kept[id(model.vae2llm.weight)] == {"step", "exp_avg", "exp_avg_sq"}


def test_tables_output_layers_and_small_matrices_are_adamws() -> None:
    matrix = torch.zeros(128, 128)
    assert by_muon("language_model.model.layers.0.mlp.up_proj.weight", matrix)
    assert not by_muon("language_model.model.embed_tokens.weight", matrix)
    assert not by_muon("language_model.lm_head.weight", matrix)
    assert not by_muon("vit_model.vision_model.embeddings.position_embedding.weight", matrix)
    assert not by_muon("connector.fc1.weight", torch.zeros(128, 32))
    assert not by_muon("connector.fc1.bias", torch.zeros(128))
