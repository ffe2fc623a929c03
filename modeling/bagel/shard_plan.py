"""How the model falls into units for sharding, recomputation and compilation: plain data for `train/distributed/units.py`."""

from dataclasses import dataclass

from modeling.bagel.config import BagelConfig
from modeling.heads import head_class
from modeling.towers import tower_of


@dataclass(frozen=True, slots=True)
class ShardUnit:
    """One module that is gathered, run and freed as a whole.

    Attributes:
        fqn: its name in the model.
        reshard: free the gathered parameters after forward.
        recompute: a layer of a stack, which may be run again in backward instead of keeping its activations.
        exact: computes in float32 whatever the run's --param_dtype, and so never joins another unit.
        pieces: its methods that are tensors in, tensors out, whatever the pack looks like: what can be compiled, and run again
            without what stands between them.
    """

    fqn: str
    reshard: bool = True
    recompute: bool = False
    exact: bool = False
    pieces: tuple[str, ...] = ()


def shard_plan(config: BagelConfig) -> tuple[ShardUnit, ...]:
    """Units in the order they run; what is in none belongs to the root."""
    vit = (
        *(_layers(stack, config.vit.num_hidden_layers) if (stack := tower_of(config.vit).layers) else ()),
        ShardUnit("vit_model"),
        ShardUnit("connector"),
    )
    return (
        *(vit if config.visual_und else ()),
        *_layers("language_model.model.layers", config.llm.num_hidden_layers),
        *(
            ShardUnit(f"heads.{name}", exact=head_class(name, options).exact)
            for name, options in config.heads.items()
        ),
    )


def _layers(stack: str, count: int) -> tuple[ShardUnit, ...]:
    # Between the two stands attention, whose shape is another for every pack.
    pieces = ("before_attention", "after_attention")
    return tuple(ShardUnit(f"{stack}.{i}", recompute=True, pieces=pieces) for i in range(count))
