"""How the model falls into units for sharding and recomputation: plain data, read by `train/distributed/sharding.py`."""

from dataclasses import dataclass

from modeling.bagel.config import BagelConfig


@dataclass(frozen=True, slots=True)
class ShardUnit:
    """One module that is gathered, run and freed as a whole.

    Attributes:
        fqn: its name in the model.
        reshard: free the gathered parameters after forward.
        recompute: run forward again in backward instead of keeping activations.
    """

    fqn: str
    reshard: bool = True
    recompute: bool = False


def shard_plan(config: BagelConfig) -> tuple[ShardUnit, ...]:
    """Units in the order they run; what is in none belongs to the root."""
    vit = [
        *(
            ShardUnit(f"vit_model.vision_model.encoder.layers.{i}", recompute=True)
            for i in range(config.vit.num_hidden_layers)
        ),
        ShardUnit("vit_model"),
        ShardUnit("connector"),
    ]
    llm = [f"language_model.model.layers.{i}" for i in range(config.llm.num_hidden_layers)]
    heads = [f"heads.{name}" for name in config.heads]
    return (
        *(vit if config.visual_und else ()),
        *(ShardUnit(fqn, recompute=True) for fqn in llm),
        *(ShardUnit(fqn) for fqn in heads),
    )
