"""From Hugging Face directories to an exported model, as a person walks it: two ranks train, one process exports."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from inference_pipeline.inferencer import Inferencer, Prompt
from modeling.qwen2.config import Qwen2Config
from modeling.qwen2.model import Qwen2ForCausalLM
from modeling.siglip.config import SiglipConfig
from modeling.siglip.model import SiglipVisionModel
from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import ROOT, run_trainer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200)]


def huggingface(folder: Path, quickstart: Quickstart) -> None:
    """A tied language model with the quickstart's tokenizer and a tower for its pictures, in Hugging Face's form.

    (tests/unit/modeling/test_huggingface.py reads what transformers itself writes; importing it takes longer than all this.)
    """
    size = json.loads((quickstart.model / "llm_config.json").read_text())["vocab_size"]
    small = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    llm = {
        **small,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "vocab_size": size,
        "tie_word_embeddings": True,
    }
    vit = {**small, "num_hidden_layers": 3, "patch_size": 8, "image_size": 64}
    dense = Qwen2Config(**{**llm, "layer_module": "Qwen2DecoderLayer", "qk_norm": False})
    for name, kind, config, model in (
        ("llm", "qwen2", llm, Qwen2ForCausalLM(dense)),
        ("vit", "siglip_vision_model", vit, SiglipVisionModel(SiglipConfig(**vit))),
    ):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps({"model_type": kind, **config}))
        tensors = {key: p.detach() for key, p in model.named_parameters()}
        for key in [key for key in tensors if key.endswith("patch_embedding.weight")]:
            tensors[key] = (
                tensors[key].unflatten(1, (8, 8, 3)).permute(0, 3, 1, 2).contiguous()
            )  # a convolution's kernel
        save_file(tensors, folder / name / "model.safetensors")
    shutil.copy(quickstart.model / "tokenizer.json", folder / "llm")


def test_a_fresh_model_is_trained_and_exported(quickstart: Quickstart, tmp_path: Path) -> None:
    huggingface(tmp_path, quickstart)
    flags = {
        "dataset_config_file": quickstart.mixture,
        "model_path": quickstart.model,  # its bagel_config.json says which heads there are
        "llm_path": "llm",
        "vit_path": "vit",
        "vae_path": quickstart.model,
        "max_latent_size": 4,
        "results_dir": "results",
    }
    done = run_trainer(tmp_path, **flags)
    assert done.code == 0, done.output
    assert done.lines("llm/model.safetensors: language_model: 27 of 31 tensors loaded")
    assert done.lines("vit/model.safetensors: vit_model: 37 of 37 tensors loaded")
    command = [sys.executable, "-m", "scripts.convert.export", "results/checkpoints/0000002", "out"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    made = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=100, check=False
    )
    assert made.returncode == 0, made.stderr
    trained = load_file(tmp_path / "results" / "model" / "ema.safetensors")
    exported = load_file(tmp_path / "out" / "ema.safetensors")
    assert trained.keys() == exported.keys() and all((exported[k] == x).all() for k, x in trained.items())
    vit = json.loads((tmp_path / "out" / "vit_config.json").read_text())
    assert vit["num_hidden_layers"] == 3  # two are built; published loaders take one off
    ask = [Prompt(text="What is here?")]
    said = [Inferencer.from_model_dir(tmp_path / d).answer(ask, 4)[0].text for d in ("out", "results/model")]
    assert said[0] == said[1]
