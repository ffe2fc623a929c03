"""What `benchmarks/data_pipeline.py` compares is the same work: tokens, places, labels, pixels and masks agree with ours."""

import importlib.util
import sys
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from data.layout import visible_pairs

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "data_pipeline.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pipeline_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(benchmark, tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "noise", lambda rng: rng.integers(0, 256, (600, 600, 3), dtype=np.uint8))
        benchmark.make_tokenizer(base)
        benchmark.make_data(base / "512px", 512, 12)
    return base / "512px"


def test_pixels_and_tokens_are_the_same(benchmark, folder):
    benchmark.require_same_tokens(folder)
    assert benchmark.pixel_differences(folder) == (0, 0.0)


def test_the_restated_pack_is_ours_in_other_clothes(benchmark, folder, monkeypatch):
    monkeypatch.setattr(benchmark, "build_loader", lambda plan, num_workers: build_loader(plan))
    build_loader = importlib.import_module("data.loader").build_loader
    ours = next(benchmark.weft(folder))
    published = benchmark.Published(folder, dense=True)
    published.tokenizer = benchmark.PythonTokenizer(folder.parent / "tokenizer.json")
    published.special = benchmark.Tokenizer(folder.parent).special
    rows = list(islice(published.samples(), 12))
    order = [int(origin.where.rpartition(":")[2]) - 1 for origin in ours.origins]
    theirs = published.packed([rows[i] for i in order])
    for name, value in {
        "packed_text_ids": ours.text_ids,
        "packed_text_indexes": ours.text_index,
        "packed_position_ids": ours.position,
        "packed_label_ids": ours.label_ids,
        "ce_loss_indexes": ours.label_index,
        "ce_loss_weights": ours.label_weight,
        "packed_vit_tokens": (ours.und_patches.float().div(255) - 0.5) / 0.5,
        "packed_vit_position_ids": ours.und_position,
        "packed_vit_token_indexes": ours.und_index,
        "vit_token_seqlens": ours.und_hw.prod(1),
    }.items():
        torch.testing.assert_close(theirs[name], value, msg=name)
    assert theirs["sample_lens"] == list(ours.sample_lens)
    seen = sum(int((mask == 0).sum()) for mask in theirs["nested_attention_masks"])
    assert seen == visible_pairs(ours.sample_lens, ours.split_lens, ours.split_modes, ours.split_branches)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its shard open
def test_webdataset_gives_the_same_pixels_and_tokens(benchmark, folder):
    wds = pytest.importorskip("webdataset")
    prepare = benchmark.Prepare(folder.parent / "tokenizer.json")
    samples = wds.WebDataset(str(folder / "shard.tar"), shardshuffle=False).decode("pil")
    theirs = [prepare(sample) for sample in samples]
    tokenizer = benchmark.PythonTokenizer(folder.parent / "tokenizer.json")
    assert len(theirs) == 12
    published = benchmark.Published(folder, dense=False)
    published.tokenizer = tokenizer
    for (pixels, texts), sample in zip(theirs, published.samples(), strict=False):
        assert torch.equal(pixels, sample.pixels)
        assert [text.tolist() for text in texts] == list(sample.texts)
