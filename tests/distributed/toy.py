"""A small model with the shape of the real one: names that fall into parameter groups, nested units, a dataclass as output."""

import torch
from torch import Tensor, nn

from modeling.bagel.shard_plan import ShardUnit
from modeling.types import HeadOutput
from train.args import Args, FsdpArgs
from train.config import build_args
from train.distributed.collectives import world_size
from train.distributed.mesh import build_mesh
from train.distributed.sharding import materialise, shard_model
from train.ema import Ema
from train.optim import build_optimizer
from train.param_manager import freeze, optimizer_groups
from train.state import TrainState

UNITS = (
    ShardUnit("vit_model"),
    ShardUnit("vit_model.layers.0", recompute=True),
    ShardUnit("connector"),
    ShardUnit("heads.box"),
)
WIDTH, LANES = 6, 4


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 5), nn.Linear(5, WIDTH)])

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[1](torch.tanh(self.layers[0](x)))


class Box(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> HeadOutput:
        return HeadOutput(boxes=self.out(x), mask_logits=x.new_zeros(0))


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.vit_model = Tower()
        self.connector = nn.Linear(WIDTH, WIDTH)
        self.vit_pos_embed = nn.Parameter(torch.empty(1, WIDTH), requires_grad=False)
        self.heads = nn.ModuleDict({"box": Box()})

    def forward(self, x: Tensor) -> HeadOutput:
        return self.heads["box"](self.connector(self.vit_model(x)) + self.vit_pos_embed)


def starting_value(name: str, shape: torch.Size) -> Tensor:
    """Depends on the name only, as in the real model."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    return torch.randn(shape, generator=generator) * 0.3


def build(args: Args, *, sharded: bool = True, device: str = "cpu") -> TrainState:
    with torch.device("meta"):
        model = Toy()
    model.vit_pos_embed.requires_grad_(False)
    freeze(model, args.params)
    if sharded:
        shard_model(model, UNITS, build_mesh(args.fsdp, world_size(), torch.device(device).type), args.fsdp)
    materialise(model, args.fsdp.home(device), starting_value)
    optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
    return TrainState.create(
        model,
        optimizer,
        Ema(model, args.optim.ema, warmup=args.optim.ema_warmup, on_cpu=args.optim.ema_on_cpu),
        LANES,
    )


def toy_args(**flags: object) -> Args:
    fixed = {
        "min_unit_params": 0,
        "param_dtype": "fp32",
        "reduce_dtype": "fp32",
        "warmup_steps": 2,
        "lr": 0.01,
        "ema": 0.9,
    }
    return build_args({**fixed, **flags})


def fsdp_args(**flags: object) -> FsdpArgs:
    return toy_args(**flags).fsdp


def rows(count: int) -> tuple[Tensor, Tensor]:
    """`count 3` inputs and `count 4` targets."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, generator=generator), torch.randn(count, 4, generator=generator)
