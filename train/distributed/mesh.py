"""How the ranks are arranged: `replicate` x `shard`. All four published strategies are shapes of this one mesh."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.config import FsdpArgs


def mesh_shape(args: FsdpArgs, world_size: int) -> tuple[int, int]:
    """Replicas and shards of a strategy.

    Args:
        args: `num_shard` 0 means: as many as the ranks allow.
        world_size: number of ranks.

    Returns:
        `(num_replicate, num_shard)`; their product is the world size.

    Raises:
        ValueError: if the numbers asked for do not fit the strategy or the ranks.
    """
    replicate, shard = args.num_replicate, args.num_shard
    if args.sharding_strategy == "NO_SHARD":
        fits = replicate in (1, world_size) and shard in (0, 1)
        replicate, shard = world_size, 1
    elif args.sharding_strategy == "HYBRID_SHARD":
        shard = shard or world_size // replicate
        fits = replicate * shard == world_size
    else:
        fits = replicate == 1 and shard in (0, world_size)
        shard = world_size
    if not fits:
        raise ValueError(
            f"--sharding_strategy {args.sharding_strategy} with --num_replicate {args.num_replicate} and --num_shard "
            f"{args.num_shard} does not fit {world_size} ranks; "
            + {
                "HYBRID_SHARD": "their product must be the number of ranks (--num_shard 0 works it out)",
                "NO_SHARD": "every rank is a replica: leave both flags out",
            }.get(
                args.sharding_strategy,
                "it has one replica over all ranks: leave both flags out, or use HYBRID_SHARD",
            )
        )
    return replicate, shard


def build_mesh(args: FsdpArgs, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh, with axes named `replicate` and `shard`."""
    shape = mesh_shape(args, world_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
