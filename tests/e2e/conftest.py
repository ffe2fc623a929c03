"""The quickstart's data and model directory, made by its own scripts, as small as they get."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from modeling.autoencoder import AutoEncoder, AutoEncoderConfig, save_autoencoder
from scripts.data import make_quickstart, make_quickstart_model

SMALL_CONFIGS = {
    "llm_config": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "vit_config": {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    },
    "bagel_config": {"heads": {"box": {"width": 16}, "mask": {"channels": 8}}},
}
SMALL_AUTOENCODER = AutoEncoderConfig(
    ch=8,
    ch_mult=(1, 1, 1, 1),
    num_res_blocks=1,
    z_channels=4,
    num_groups=4,
    resolution=64,
    scale_factor=1.0,
    shift_factor=0.0,
)


@dataclass(frozen=True, slots=True)
class Quickstart:
    """Where things are: `data` of `make_quickstart.py`, a model directory without weights, and the mixture."""

    data: Path
    model: Path
    mixture: Path


@pytest.fixture(scope="session")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    """Read only: a test that breaks something works on a copy."""
    return make_small(tmp_path_factory.mktemp("quickstart"))


def make_small(root: Path) -> Quickstart:
    """Make it all in a folder."""
    data, model = root / "data", root / "base"
    make_quickstart.make(data, sizes={"train": 40, "val": 1, "test": 1}, seed=0, workers=1)
    make_quickstart_model.make(data, model, 100)
    for name, changes in SMALL_CONFIGS.items():
        file = model / f"{name}.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    torch.manual_seed(0)
    save_autoencoder(AutoEncoder(SMALL_AUTOENCODER), model)
    published = (Path(__file__).parents[2] / "configs" / "quickstart.yaml").read_text()
    mixture = root / "mixture.yaml"
    mixture.write_text(published.replace("${WEFT_DATA:../runs/quickstart/data}", str(data)))
    return Quickstart(data, model, mixture)
