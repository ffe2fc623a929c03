"""Train: `torchrun --standalone --nproc_per_node=N train/main.py --dataset_config_file MIXTURE.yaml --model_path DIR …`.

Reads as the table of contents of a training run; `--help` lists the flags.
"""

import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs from any directory

import torch

from data.first_rows import asked_heads
from data.ledger import Demand
from data.loader import build_loader
from data.mixture import Group, build_groups, load_mixture
from data.stream import StreamPlan, make_sample
from data.tokens import ANCHORS, Tokenizer
from data.types import PackedBatch, Reject
from modeling.autoencoder import load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.config import BagelConfig
from modeling.bagel.shard_plan import shard_plan
from modeling.build import Values, build_model, starting_values, stored_values, weights_kind
from modeling.heads import head_class
from modeling.ops.matmul import set_matmul_precision
from modeling.source import ModelSource
from train.args import Args, FsdpArgs
from train.assemble import build_run, build_state, prepare_model
from train.checkpoint import Checkpoints, SaveInBackground, Start
from train.config import parse_args
from train.curves import GradientShares, LossesBySource
from train.distributed.session import World, run_entry, session
from train.distributed.sharding import DTYPES
from train.distributed.units import describe_units
from train.hooks import Hook, closing_all
from train.journal import Journal
from train.loop import Run, train
from train.loss_scale import precision_lines
from train.param_manager import describe, freeze, frozen_stay, keep_frozen_in, lr_scale
from train.published import start_up_lines
from train.report import Reporter, wandb_starter
from train.source import model_source
from train.state import TrainState
from train.stop import StopOnSignal
from train.tuning import tuning_of
from train.validation import Validation, validation_plan, validation_specs
from train.watch import Norms, Profile

logger = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> None:
    """One run, from flags to exported model."""
    args = parse_args(argv, about=sharding)
    with session(args.train.dist_timeout_s, args.train.global_seed) as world:
        stop = StopOnSignal()
        set_matmul_precision(args.fsdp.matmul_precision, world.device.type)
        for line in (
            *start_up_lines(args.flat(), world.device.type),
            *precision_lines(args.fsdp, world.device.type),
        ):
            logger.info("%s", line)
        wandb = wandb_starter(args.train, args.flat())
        source = model_source(args.model)  # every configuration file; no weights yet
        tokenizer = Tokenizer(source.tokenizer_path)
        specs = load_mixture(args.data.dataset_config_file)
        groups = build_groups(specs, tokenizer, args.data.index_cache_dir)
        val_groups = build_groups(validation_specs(args), tokenizer, args.data.index_cache_dir)
        require_heads(source.config, (*groups, *val_groups), source.model_path)
        checkpoints = Checkpoints.build(args.checkpoint, args.flat(), args.train.dist_timeout_s)
        start = checkpoints.open(args.checkpoint)
        tuning = tuning_of(args, source, start)  # other weights, or adapters beside them
        tuning.require_room()  # known now, not after the last step

        model = build_model(
            for_training(source.config, args, (*groups, *val_groups))
        )  # meta device, plain modules
        _require_vocabulary(model, tokenizer)
        base = first_values(args, source, model, start if tuning.reads_start else None)
        prepare_model(model, args, world.device.type, tuning.attach)
        values, scale = tuning.values(base), lr_scale(args.params, args.tokens_per_step(world.size))
        vae = load_autoencoder(source.vae_path, world.device)
        if args.params.print_param_details:
            still = {**tuning.beside(), "vae": (sum(p.numel() for p in vae.parameters()), "frozen")}
            logger.info("%s", describe(model, args.params, args.optim.lr, scale, still))
        plan = StreamPlan.from_flags(args.data, groups, model.config.layout, tokenizer.special)
        if args.train.validate_only:
            return validate(model, plan, val_groups, args.fsdp, world)
        # The only line that distributes.
        state = build_state(model, args, world, values, complete=tuning.complete, demands=demands(groups))
        state.unstored, checkpoints.beside = tuning.unstored, tuning.snapshot
        if start is not None and not start.published:
            checkpoints.restore(state, start)

        results_dir = Path(args.checkpoint.results_dir)
        journal = Journal(
            results_dir, world, steps_done=state.step, plan=plan, specs=specs, tokenizer=tokenizer
        )
        sizes = {g.name: len(g.source) for g in groups}
        run = build_run(model, args, world, vae, journal=journal.step, group_sizes=sizes)
        batches = open_loader(args, plan, world, state)
        with (
            Reporter(
                results_dir,
                first_step=state.step,
                total_steps=args.optim.total_steps,
                log_every=args.train.log_every,
                tensorboard=args.train.enable_tensorboard,
                is_main=world.is_main,
                wandb=wandb,
            ) as reporter,
            closing(journal),
            frozen_stay(model, check=args.params.validate_freezing),
            closing_all(
                (
                    stop,
                    SaveInBackground(checkpoints),
                    *beside(run, model, reporter, validation_plan(plan, val_groups), tokenizer, checkpoints),
                )
            ) as hooks,
        ):
            run = replace(run, hooks=hooks)
            world.lookout.follow(lambda: (state.step + 1, run.clock.now))
            train(run, state, batches, checkpoints, reporter)
        tuning.export(state)
        logger.info("wrote what was trained to %s", tuning.target)


def beside(
    run: Run,
    model: Bagel,
    reporter: Reporter,
    val_plan: StreamPlan,
    tokenizer: Tokenizer,
    checkpoints: Checkpoints,
) -> tuple[Hook, ...]:
    """What is looked at beside training, in the order in which it is done after a step."""
    hooks: list[Hook] = []
    hooks.append(
        LossesBySource(reporter, run.objective, run.args.train.log_every, run.args.optim.total_steps)
    )
    if every := run.args.loss.gradient_share_every:
        hooks.append(GradientShares(model, reporter, run.objective, every))
    if (steps := run.args.train.profiled) is not None:
        folder = Path(run.args.checkpoint.results_dir) / "profile"
        hooks.append(Profile(folder, *steps, run.world, memory=run.args.train.memory_snapshot))
    if run.args.train.norms_every:
        hooks.append(Norms(reporter, run.args.train.norms_every))
    if val_plan.groups:
        listeners = [lambda step, figures: checkpoints.note(figures)]  # for --keep_best
        hooks.append(Validation(run, val_plan, tokenizer, reporter, listeners))
    return tuple(hooks)


def for_training(config: BagelConfig, args: Args, groups: Sequence[Group]) -> BagelConfig:
    """The configuration with where the flags let no gradient pass, if the groups have all that they need.

    Raises:
        ValueError: if a group needs what is left out.
    """
    left_out = {"vit": "visual_und", "vae": "visual_gen"}
    for group in groups:
        for part in group.dataset.needs:
            if not getattr(args.model, left_out[part]):
                raise ValueError(
                    f"group {group.name!r}: {type(group.dataset).__name__} needs the {part.upper()}, which --{left_out[part]} "
                    "False leaves out; take the group out of the mixture, or the flag"
                )
    return replace(
        config, llm=replace(config.llm, freeze_und=config.llm.freeze_und or args.params.freeze_und)
    )


def require_heads(config: BagelConfig, groups: Sequence[Group], model_path: Path) -> None:
    """Stop over a group whose boxes or masks no head would learn. Of rows that may have `objects` some are looked at: what they
    do not show is known when it comes, in `Bagel.forward`.

    Raises:
        ValueError: naming the group, the head and the file that says which heads there are.
    """
    known = ", ".join(config.heads) or "none"
    named = f"({model_path / 'bagel_config.json'} names its heads: {known})"
    for group in groups:
        if missing := [head for head in group.dataset.heads if head not in config.heads]:
            can_stay = len(missing) < len(group.dataset.heads)
            rest = "".join(f", set its {head}_templates: []" for head in missing) if can_stay else ""
            raise ValueError(
                f"group {group.name!r}: {type(group.dataset).__name__} asks for what the model has no head for: "
                f"{', '.join(missing)} {named}; take the group out of the mixture{rest}, or start from a model that has them"
            )
        asked = asked_heads(group.dataset, group.source)
        _require_views(config, group, {*group.dataset.heads, *asked})
        _require_room(config, group)
        for head, where in asked.items():
            if head not in config.heads:
                raise ValueError(
                    f"group {group.name!r}: {where} asks for what the model has no head for: {head} {named}; remove the row's "
                    f"objects and their {ANCHORS[head]}, take the group out of the mixture, or start from a model that has it"
                )


def _require_views(config: BagelConfig, group: Group, asked: set[str]) -> None:
    for head in sorted(asked & config.heads.keys()):
        options = config.heads[head]
        if head_class(head, options).wants_view(options) and group.dataset.head_transform is None:
            raise ValueError(
                f"group {group.name!r}: the {head} head has an image encoder of its own, which sees no picture; give the group "
                "head_image_transform_args (for SAM's encoder {type: sam, image_size: 1024})"
            )


def _require_room(config: BagelConfig, group: Group) -> None:
    for head in group.dataset.heads:
        options = config.heads[head]
        most = head_class(head, options).most_objects(options)
        if most is not None and group.dataset.max_objects > most:
            raise ValueError(
                f"group {group.name!r}: max_objects {group.dataset.max_objects} is more than the {head} head can find, {most} "
                "(num_queries in bagel_config.json); lower the one or raise the other"
            )


def first_values(args: Args, source: ModelSource, model: Bagel, start: Start | None) -> Values:
    """Where the weights come from. A checkpoint of ours is read later, over zeros that cost nothing."""
    if start is not None and not start.published:
        return lambda name, shape: torch.zeros(()).expand(shape)
    directory = source.model_path if start is None else start.path
    kind = weights_kind(directory, prefer_ema=args.checkpoint.finetune_from_ema)
    if start is not None:
        return stored_values(directory, model, kind)
    return starting_values(source, model, weights=kind, seed=args.train.global_seed)


def open_loader(args: Args, plan: StreamPlan, world: World, state: TrainState) -> Iterator[PackedBatch]:
    """The packs of this rank, from where the state stands."""
    return build_loader(
        plan,
        rank=world.rank,
        world_size=world.size,
        num_workers=args.data.num_workers,
        prefetch_factor=args.data.prefetch_factor,
        cursors=[state.cursors[lane] for lane in range(args.data.num_lanes)],
        packs_consumed=state.packs_consumed,
        worker_timeout_s=args.data.worker_timeout_s,
    )


def demands(groups: Sequence[Group]) -> dict[str, Demand]:
    """What the mixture asks of every group, for the ledger."""
    return {
        g.name: Demand(weight=g.weight, records=len(g.source), is_mandatory=g.is_mandatory) for g in groups
    }


def sharding(args: Args) -> str:
    """How the model would be sharded, for `--print_config`; or why that cannot be said."""
    try:
        model = build_model(model_source(args.model).config)
        freeze(model, args.params, args.optim.lr)
        keep_frozen_in(model, DTYPES[args.params.frozen_dtype])
        ranks = int(os.environ.get("WORLD_SIZE", 1))
        return describe_units(model, shard_plan(model.config), args.fsdp, ranks)
    except ValueError as error:
        return f"no shard plan: {error}"


def validate(
    model: Bagel, plan: StreamPlan, val_groups: tuple[Group, ...], fsdp: FsdpArgs, world: World
) -> None:
    """`--validate_only`: show what would be trained on what, and make a sample of the first record of every group.

    Raises:
        ValueError: if a group's first record cannot be used, or the lanes do not suit the ranks.
    """
    logger.info("%s", describe_units(model, shard_plan(model.config), fsdp, world.size))
    build_loader(plan, rank=world.rank, world_size=world.size, num_workers=0)
    for group in (*plan.groups, *val_groups):
        made = make_sample(plan, group, lane=0, position=0)
        if isinstance(made, Reject):
            raise ValueError(f"group {group.name}: {made.message}")
        logger.info("group %s: %d records, weight %g; first: %s", group.name, len(group.source), group.weight,
                    made.origin.where)  # fmt: skip
    logger.info("valid: nothing was trained")


def _require_vocabulary(model: Bagel, tokenizer: Tokenizer) -> None:
    size = model.config.llm.vocab_size
    if len(tokenizer) > size:
        raise ValueError(
            f"{tokenizer.path}: has {len(tokenizer)} tokens, llm_config.json says vocab_size {size}"
        )


if __name__ == "__main__":
    run_entry(main)
