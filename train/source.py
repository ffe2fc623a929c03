"""The model flags -> where the model comes from, for the trainer and for exports of its checkpoints."""

from dataclasses import replace

from modeling.source import FLAGS, ModelSource, read_source
from train.args import ModelArgs


def model_source(args: ModelArgs) -> ModelSource:
    """Read what the flags name; see `modeling.source.read_source`.

    Raises:
        ValueError: naming the file, key or flag that is missing, unreadable or contradicts another.
    """
    source = read_source(
        args.model_path,
        llm_path=args.llm_path,
        vit_path=args.vit_path,
        mask_path=args.mask_path,
        vae_path=args.vae_path,
        from_scratch=args.from_scratch,
        copy_init_moe=args.copy_init_moe,
        flags={name: getattr(args, name) for name in FLAGS},
    )
    # What a run leaves out is not in its checkpoints and exports either.
    config = replace(source.config, visual_gen=args.visual_gen, visual_und=args.visual_und)
    return replace(source, config=config)
