"""Everything that knows about ranks: the only package that imports `torch.distributed`."""
