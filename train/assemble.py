"""From flags to a model that trains and its state: what every training of the core does, whatever its data and its weights are.

`train/main.py` trains on a mixture, `train/main_benchmark.py` measures made-up batches; both come through here, so that what is
measured is what is trained. The order is fixed: kernels, adapters, what is frozen, sharding, values, optimizer.
"""

from collections.abc import Callable, Mapping, Sequence

import torch

from data.ledger import Demand
from data.types import PackedBatch
from modeling.autoencoder import AutoEncoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.latents import LatentEncoder
from modeling.bagel.shard_plan import shard_plan
from modeling.build import Values
from modeling.ops.attention_backends import usable_backend
from modeling.ops.kernels import liger_kernels, use_kernels
from train.args import Args
from train.clock import COMMUNICATION, Clock
from train.distributed.mesh import build_mesh
from train.distributed.session import World
from train.distributed.sharding import DTYPES, materialise, shard_model, time_collectives
from train.ema import Ema
from train.flops import pack_flops, peak_tflops
from train.loop import Run
from train.loss_scale import LossScale
from train.objective import build_objective
from train.optim import build_optimizer
from train.param_manager import freeze, keep_frozen_in, lr_scale, optimizer_groups
from train.state import TrainState


def prepare_model(
    model: Bagel, args: Args, device_type: str, attach: Callable[[Bagel, str], None] | None = None
) -> None:
    """Say how a plain model computes and what of it is trained.

    Args:
        model: on the meta device.
        args: of the run.
        device_type: that it will compute on.
        attach: puts adapters beside matrices.

    Raises:
        ValueError: if kernels that are asked for are not there, or nothing is left to train.
    """
    model.attention = usable_backend(args.fsdp.backend(device_type), device_type)
    if args.fsdp.liger:
        use_kernels(model, liger_kernels(device_type))
    if attach is not None:
        attach(model, device_type)
    freeze(model, args.params, args.optim.lr)
    keep_frozen_in(model, DTYPES[args.params.frozen_dtype])


def build_state(
    model: Bagel,
    args: Args,
    world: World,
    values: Values,
    *,
    complete: Callable[[Bagel, Values, torch.device], None] | None = None,
    demands: Mapping[str, Demand] | None = None,
) -> TrainState:
    """Distribute a prepared model over the ranks, fill it, and put optimizer and average beside it; every rank must call.

    Args:
        model: after `prepare_model`.
        args: of the run.
        world: this rank's place.
        values: of every parameter.
        complete: fills what sharding does not see (`Tuning.complete`).
        demands: of the groups, for the ledger.

    Raises:
        ValueError: if the strategy does not fit the ranks.
    """
    mesh = build_mesh(args.fsdp, world.size, world.device.type)
    shard_model(model, shard_plan(model.config), mesh, args.fsdp)
    materialise(model, args.fsdp.home(str(world.device)), values)
    if complete is not None:
        complete(model, values, world.device)
    scale = lr_scale(args.params, args.tokens_per_step(world.size))
    by_muon = args.optim.optimizer == "muon"
    groups = optimizer_groups(model, args.params, args.optim.lr, scale, matrices=by_muon)
    optimizer = build_optimizer(groups, args.optim)
    ema = Ema(model, args.optim.ema, warmup=args.optim.ema_warmup, on_cpu=args.optim.ema_on_cpu)
    return TrainState.create(model, optimizer, ema, args.data.num_lanes, demands, LossScale.build(args.fsdp))


def build_run(
    model: Bagel,
    args: Args,
    world: World,
    vae: AutoEncoder,
    *,
    journal: Callable[[int, Sequence[PackedBatch]], None],
    group_sizes: Mapping[str, int],
) -> Run:
    """What `train.loop` needs besides the state; without hooks."""
    encoder = LatentEncoder(vae, model.config.latent_patch_size, args.data.latent_cache_mb)
    clock = Clock(world.device)
    time_collectives(model, clock.phase, COMMUNICATION)
    return Run(
        args=args,
        world=world,
        objective=build_objective(
            args.loss, args.pictures, model.config.heads, vae, model.config.latent_patch_size
        ),
        encoder=encoder,
        journal=journal,
        group_sizes=group_sizes,
        flops=pack_flops(model, encoder),
        peak_tflops=peak_tflops(world.device_name, args.train.peak_device_tflops),
        clock=clock,
    )
