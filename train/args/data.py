"""Which data, in which packs."""

from dataclasses import dataclass
from typing import Literal

from train.args.flag import flag

Packer = Literal["conserving", "upstream_compat"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DataArgs:
    """Data."""

    dataset_config_file: str = flag(
        "", "YAML file of the mixture: groups of datasets with their weights and transforms."
    )
    index_cache_dir: str = flag(
        "",
        "Directory for the indexes of the data; without it (and without WEFT_INDEX_CACHE_DIR) they lie beside the data.",
    )
    data_seed: int = flag(42, "Seed of the data's order and of every random choice about a sample.", low=0)
    num_workers: int = flag(
        4, "Processes per rank that prepare packs; 0 prepares them in the training process.", low=0
    )
    prefetch_factor: int = flag(2, "Packs that each worker prepares ahead.", low=1)
    worker_timeout_s: float = flag(
        300.0,
        "Seconds that such a process may do nothing, hung on a file, before the run saves what it has and stops; keep it below "
        "--dist_timeout_s.",
        low=1,
    )
    num_lanes: int = flag(
        48,
        "Logical shards of the data order, at least one per rank; best a multiple of the numbers of ranks. It stays for a run's "
        "life.",
        low=1,
    )
    expected_num_tokens: int = flag(32768, "A pack is full when it has this many tokens.", low=1)
    max_num_tokens: int = flag(36864, "No pack has more tokens than this.", low=1)
    max_num_tokens_per_sample: int = flag(16384, "A sample with more tokens is rejected.", low=1)
    max_attention_pairs: int = flag(
        0,
        "No pack has more (query, key) pairs for attention to compute, and a sample with more is rejected; 0: no bound.",
        low=0,
    )
    max_buffer_size: int = flag(
        50,
        "Samples that may wait, per lane, for a pack they fit in; no sample waits for more packs than this.",
        low=0,
    )
    packer: Packer = flag(
        "conserving",
        "Which samples share a pack: `conserving` loses none, `upstream_compat` chooses (and loses) as the published packer.",
    )
    prefer_buffer_before: int = flag(
        16384,
        "Samples that wait come first while a pack has fewer tokens; for --packer upstream_compat.",
        low=0,
    )
    max_reject_fraction: float = flag(
        0.001, "Share of a group's records that may be unusable before the run stops.", low=0, high=1
    )
    text_cond_dropout_prob: float = flag(
        0.1, "Chance to leave out a text that a generated image depends on.", low=0, high=1
    )
    vit_cond_dropout_prob: float = flag(
        0.3, "Chance to leave out an understanding image as a condition.", low=0, high=1
    )
    vae_cond_dropout_prob: float = flag(
        0.3, "Chance to leave out a clean autoencoder image as a condition.", low=0, high=1
    )
    timestep_shift: float = flag(
        1.0, "Shift of the flow's training timesteps; above 1 means noisier.", low=1e-6
    )
    latent_cache_mb: int = flag(
        0,
        "Memory per rank for autoencoder encodings of images seen before, in MiB; 0 encodes every time.",
        low=0,
    )
