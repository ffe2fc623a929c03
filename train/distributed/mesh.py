"""How the ranks are arranged: `replicate` x `shard`. All four published strategies are shapes of this one mesh."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from train.args import FsdpArgs


def mesh_shape(args: FsdpArgs, world_size: int) -> tuple[int, int]:
    """Replicas and shards of a strategy. `num_replicate` and `num_shard` count for HYBRID_SHARD alone, as published.

    Args:
        args: `num_shard` 0 means: as many as the ranks allow.
        world_size: number of ranks.

    Returns:
        `(num_replicate, num_shard)`; their product is the world size.

    Raises:
        ValueError: if the numbers asked for do not fit the ranks.
    """
    if args.sharding_strategy == "NO_SHARD":
        return world_size, 1
    if args.sharding_strategy != "HYBRID_SHARD":
        return 1, world_size
    replicate = args.num_replicate
    shard = args.num_shard or world_size // replicate
    if replicate * shard != world_size:
        raise ValueError(
            f"--sharding_strategy HYBRID_SHARD with --num_replicate {args.num_replicate} and --num_shard {args.num_shard} does "
            f"not fit {world_size} ranks; their product must be the number of ranks (--num_shard 0 works it out)"
        )
    return replicate, shard


def build_mesh(args: FsdpArgs, world_size: int, device_type: str) -> DeviceMesh:
    """The mesh, with axes named `replicate` and `shard`."""
    shape = mesh_shape(args, world_size)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))
