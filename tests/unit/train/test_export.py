"""Exports: what a step holds is what comes out, whole or not at all; a model directory exported again is the same bytes."""

import json
import os
import resource
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from data.tokens import Tokenizer
from inference_pipeline.inferencer import Inferencer, Prompt
from modeling.autoencoder import load_autoencoder
from modeling.bagel.bagel import Bagel
from modeling.bagel.decode import Decoder
from modeling.bagel.latents import LatentEncoder
from modeling.build import load_model
from modeling.source import read_source
from modeling.tensor_file import Entry, plan_files, write_files
from scripts.convert.export import main, size
from tests.unit.modeling.published import (
    LLM,
    VIT,
    published_tensors,
    write_autoencoder,
    write_json,
    write_tokenizer,
)
from train import export
from train.checkpoint import Checkpoints
from train.config import build_args
from train.ema import Ema
from train.export import export_model
from train.optim import build_optimizer
from train.param_manager import freeze, optimizer_groups
from train.state import TrainState

HEADS = {"box": {"width": 16}, "mask": {"channels": 8}}


class Run:
    """A run of a small model with a checkpoint at step 7."""

    def __init__(self, root: Path):
        self.base, self.results = root / "base", root / "results"
        self.base.mkdir(parents=True)
        write_json(self.base / "llm_config.json", {**LLM, "tie_word_embeddings": False})
        write_json(self.base / "vit_config.json", VIT)
        bagel = {"max_latent_size": 6, "vit_max_num_patch_per_side": 8, "heads": HEADS}
        write_json(self.base / "bagel_config.json", bagel)
        image = {"max_image_size": 64, "min_image_size": 64}
        write_json(
            self.base / "preprocessor_config.json",
            {"vit": {**image, "stride": 8}, "vae": {**image, "stride": 16}},
        )
        write_tokenizer(self.base)
        write_autoencoder(self.base)
        (self.base / "notes.txt").write_text("no file of a model")
        args = build_args(
            {
                "model_path": str(self.base),
                "results_dir": str(self.results),
                "from_scratch": True,
                "freeze_connector": True,
            }
        )
        self.source = read_source(self.base)
        model = Bagel(self.source.config)
        model.load_state_dict(published_tensors(self.source.config))
        freeze(model, args.params)
        optimizer = build_optimizer(optimizer_groups(model, args.params, args.optim.lr), args.optim)
        self.state = TrainState.create(model, optimizer, Ema(model, 0.9), num_lanes=1)
        self.state.step = 7
        for average in self.state.ema.averages.values():
            average.mul_(0.5)  # apart from the last weights
        self.step = Checkpoints(args.checkpoint.directory, 0, args.flat()).save(self.state)

    def weights(self, kind: str) -> dict[str, torch.Tensor]:
        named = dict(self.state.model.named_parameters())
        return {
            k: v.detach()
            for k, v in (self.state.ema.with_frozen(self.state.model) if kind == "ema" else named).items()
        }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


def same_files(one: Path, other: Path) -> bool:
    names = [sorted(f.name for f in folder.iterdir()) for folder in (one, other)]
    return names[0] == names[1] and all((one / n).read_bytes() == (other / n).read_bytes() for n in names[0])


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_a_step_comes_out_as_it_was_trained(run: Run, tmp_path: Path, kind: str) -> None:
    main([str(run.step), str(tmp_path / "out"), "--weights", kind])
    expected = run.weights(kind)
    save_file(expected, tmp_path / "library", metadata={"format": "pt"})
    assert (tmp_path / "out" / f"{kind}.safetensors").read_bytes() == (tmp_path / "library").read_bytes()
    assert {"latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed"} < expected.keys()
    loaded = dict(load_model(tmp_path / "out", kind).named_parameters())
    assert all(torch.equal(loaded[name], x) for name, x in expected.items())


def test_a_directory_has_what_the_published_programs_read(run: Run, tmp_path: Path) -> None:
    main([str(run.step), str(tmp_path / "out")])
    out = tmp_path / "out"
    assert sorted(f.name for f in out.iterdir()) == [
        "ae.safetensors", "ae_config.json", "bagel_config.json", "config.json", "ema.safetensors", "llm_config.json",
        "manifest.json", "merges.txt", "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "vit_config.json",
        "vocab.json",
    ]  # fmt: skip
    vit, llm = (json.loads((out / f"{part}_config.json").read_text()) for part in ("vit", "llm"))
    stored = load_file(out / "ema.safetensors")
    layers = {k.split(".")[4] for k in stored if k.startswith("vit_model.vision_model.encoder.layers.")}
    assert vit["num_hidden_layers"] - 1 == len(layers) == 2  # published loaders take one off
    assert (vit["rope"], llm["tie_word_embeddings"], llm["qk_norm"]) == (False, False, True)
    assert llm["layer_module"] == "Qwen2MoTDecoderLayer"
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["source"] == {"run": str(run.results), "step": 7}
    assert manifest["beyond_published"] == ["heads", "a VAE of another size"]
    assert manifest["code"]["version"]
    for name, entry in manifest["files"].items():
        assert export.describe_file(out / name) == entry
    assert {*manifest["files"], "manifest.json"} == {f.name for f in out.iterdir()}


def test_the_older_tokenizer_files_are_the_same_tokenizer(run: Run, tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    main([str(run.step), str(tmp_path / "out")])
    (tmp_path / "out" / "tokenizer.json").unlink()
    theirs, ours = Qwen2Tokenizer.from_pretrained(tmp_path / "out"), Tokenizer(run.base)
    for text in ("what is here?", "two 77 red  things\n ", "<|im_start|>a<BOX><|im_end|>", "Größe 字"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text).tolist(), text
    specials = {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"}
    assert specials <= set(theirs.all_special_tokens)


@pytest.mark.parametrize("flags", [[], ["--dtype", "bf16"], ["--shard_size", "20KB"], ["--weights", "model"]])
def test_export_load_export_gives_the_same_bytes(
    run: Run, tmp_path: Path, flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "code_version", lambda: {"version": "1"})  # somebody may commit in between
    main([str(run.step), str(tmp_path / "one"), *flags])
    again = [] if "--dtype" in flags else flags  # the precision is that of the directory
    main([str(tmp_path / "one"), str(tmp_path / "two"), *again])
    assert same_files(tmp_path / "one", tmp_path / "two")
    kind = "model" if "model" in flags else "ema"
    trained, loaded = run.weights(kind), dict(load_model(tmp_path / "two", kind).named_parameters())
    for name, x in trained.items():
        expected = x.bfloat16().float() if "--dtype" in flags and "pos_embed" not in name else x
        assert torch.equal(loaded[name], expected), name
    if "--shard_size" in flags:
        shards = sorted((tmp_path / "one").glob("ema-*-of-*.safetensors"))
        index = json.loads((tmp_path / "one" / "ema.safetensors.index.json").read_text())
        assert len(shards) > 3 and index["weight_map"].keys() == trained.keys()
        assert (
            max(sum(x.nbytes for x in load_file(f).values()) for f in shards if len(load_file(f)) > 1)
            <= 20_000
        )
        assert index["metadata"]["total_size"] == sum(x.nbytes for x in trained.values())


def watch(inferencer: Inferencer) -> dict[str, list[object]]:
    """Note the tokens that are written and the latents that are decoded."""
    decoder, seen = inferencer.decoder, {"ids": [], "latents": []}
    write, decode = decoder.write, decoder.decode

    def noted_write(*args, **kwargs):
        written = write(*args, **kwargs)
        seen["ids"] += [w.ids for w in written]
        return written

    def noted_decode(tokens, grid):
        seen["latents"].append(tokens)
        return decode(tokens, grid)

    decoder.write, decoder.decode = noted_write, noted_decode
    return seen


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_inference_on_an_export_is_the_training_process_own(run: Run, tmp_path: Path, kind: str) -> None:
    """Show 5: the same tokens and the same latents, bit for bit."""
    main([str(run.step), str(tmp_path / "out"), "--weights", kind])
    exported = Inferencer.from_model_dir(tmp_path / "out", kind)
    model = Bagel(run.source.config).eval()
    model.load_state_dict(run.weights(kind))
    encoder = LatentEncoder(load_autoencoder(run.base), run.source.config.latent_patch_size)
    tokenizer = Tokenizer(run.base)
    decoder = Decoder(model, encoder, run.source.config.layout, tokenizer.special)
    trained = Inferencer(
        decoder, tokenizer, exported._transforms["und_image"], exported._transforms["cond_image"]
    )
    picture = Image.effect_noise((64, 48), 80).convert("RGB")
    seen = []
    for inferencer in (exported, trained):
        seen.append(watch(inferencer))
        prompts = [Prompt(text="what is here?", images=(picture,)), Prompt(text="two red")]
        answers = inferencer.answer(prompts, max_new_tokens=12)
        drawn = inferencer.generate(
            prompts[:1], height=64, width=64, num_timesteps=4, cfg_img_scale=1.5, seed=3
        )
        seen[-1]["said"] = [a.text for a in answers]
        seen[-1]["pixels"] = [drawn[0].image.tobytes()]
    assert seen[0]["ids"] == seen[1]["ids"] and any(seen[0]["ids"])
    assert len(seen[0]["latents"]) == 1 and seen[0]["latents"][0].abs().max() > 0
    assert all(torch.equal(a, b) for a, b in zip(seen[0]["latents"], seen[1]["latents"], strict=True))
    assert (seen[0]["said"], seen[0]["pixels"]) == (seen[1]["said"], seen[1]["pixels"])


def test_what_the_trainer_writes_is_the_same(run: Run, tmp_path: Path) -> None:
    export_model(run.state, run.source, tmp_path / "trainer", str(run.results))
    for kind in ("ema", "model"):
        main([str(run.step), str(tmp_path / kind), "--weights", kind])
        for file in (tmp_path / kind).iterdir():
            if file.name != "manifest.json":
                assert (tmp_path / "trainer" / file.name).read_bytes() == file.read_bytes(), file.name


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    import weakref

    alive: list[weakref.ref] = []

    def tensors() -> Iterator[tuple[str, torch.Tensor]]:
        for i in range(4):
            assert not [ref for ref in alive if ref() is not None]
            tensor = torch.randn(100)
            alive.append(weakref.ref(tensor.untyped_storage()))
            yield f"t{i}", tensor
            del tensor

    entry = Entry(shape=(100,), dtype=torch.float32)
    write_files(tmp_path, plan_files("x", {f"t{i}": entry for i in range(4)}, 800), tensors())
    assert len(alive) == 4


# ------------------------------------------------------------------------------------------------- what goes wrong


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        main([str(word) for word in words])
    message = str(stop.value.code)
    assert message.startswith("error: ") and "\n" not in message
    return message


def test_a_wrong_source_is_named(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    steps = run.step.parent
    assert f"0000008: there is no such directory; complete steps there: {run.step.name}" in fails(
        capsys, steps / "0000008", out
    )
    for place in (steps, run.results):
        assert f"is a directory of steps; name one of them, such as {run.step}" in fails(capsys, place, out)
    assert "no complete step is there either" in fails(capsys, tmp_path / "x" / "0000001", out)
    assert "base: has no weights of the kind `ema` (ema.safetensors)" in fails(capsys, run.base, out)
    half = tmp_path / "half" / "0000009"
    shutil.copytree(run.step, half)
    (half / "data.json").unlink()
    assert "0000009: is not a complete checkpoint" in fails(capsys, half, out)
    shutil.copytree(run.step, tmp_path / "half" / "0000010")
    state = tmp_path / "half" / "0000010" / "state"
    index = json.loads((state / "index.json").read_text())
    name = next(name for name in index if name.startswith("ema."))
    (entry,) = index[name]["pieces"]
    data = bytearray((state / entry["file"]).read_bytes())
    data[entry["offset"]] ^= 1
    (state / entry["file"]).write_bytes(data)
    assert f"state/{entry['file']}: {name} changed since it was written" in fails(
        capsys, tmp_path / "half" / "0000010", out
    )
    assert not out.exists()


def test_model_files_that_moved_are_asked_for(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "0000007"
    shutil.copytree(run.step, moved)
    args = json.loads((moved / "args.json").read_text())
    write_json(moved / "args.json", {**args, "model_path": str(tmp_path / "gone")})
    manifest = json.loads((moved / "manifest.json").read_text())
    manifest["files"]["args.json"] = export.describe_file(moved / "args.json")
    write_json(moved / "manifest.json", manifest)
    message = fails(capsys, moved, tmp_path / "out")
    assert "gone/llm_config.json: cannot be read" in message and message.endswith(
        "name a model directory that has them (--model_path)"
    )
    main([str(moved), str(tmp_path / "out"), "--model_path", str(run.base)])
    assert (tmp_path / "out" / "ema.safetensors").is_file()
    assert "is a model directory, which has files of its own" in fails(
        capsys, tmp_path / "out", tmp_path / "other", "--model_path", run.base
    )


def test_only_an_export_is_replaced(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("ten years")
    assert "out: holds thesis.txt, which no export has written; move it away" in fails(capsys, run.step, out)
    (out / "thesis.txt").unlink()
    main([str(run.step), str(out)])  # an empty directory
    main([str(run.step), str(out), "--dtype", "bf16"])  # an export
    assert load_file(out / "ema.safetensors")["llm2vae.weight"].dtype == torch.bfloat16
    (out / "ema_bf16.safetensors").write_bytes(b"")
    assert "out: holds ema_bf16.safetensors, which no export" in fails(capsys, run.step, out)
    assert "is what is exported" in fails(capsys, out, out)
    (tmp_path / "file").write_text("")
    assert "file: is a file; an export is a directory" in fails(capsys, run.step, tmp_path / "file")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "out"]


def test_what_cannot_be_written_leaves_nothing_behind(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main([str(run.step), str(out)])
    before = {f.name: f.read_bytes() for f in out.iterdir()}
    (tmp_path / "file").write_text("")
    assert "file/out: the model cannot be written (Not a directory)" in fails(
        capsys, run.step, tmp_path / "file" / "out"
    )
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 2**18))
        assert "the export needs 0.00 GiB, 0.00 GiB are free there" in fails(capsys, run.step, out)
    # No file may grow beyond this: the weights fail in the middle, as on a full disk.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        assert "out: the model cannot be written (File too large); make room" in fails(capsys, run.step, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name: f.read_bytes() for f in out.iterdir()} == before
    assert sorted(f.name for f in tmp_path.iterdir()) == ["file", "out"]


def test_what_stood_there_comes_back_if_it_cannot_be_replaced(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    main([str(run.step), str(out)])
    rename = os.rename

    def refuse(source: Path, target: Path) -> None:
        if Path(source).name.endswith("draft"):
            raise PermissionError(13, "Permission denied")
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", refuse)
        assert "cannot be written (Permission denied)" in fails(capsys, run.step, out, "--dtype", "bf16")
    assert load_file(out / "ema.safetensors")["llm2vae.weight"].dtype == torch.float32
    assert [f.name for f in tmp_path.iterdir()] == ["out"]
    (tmp_path / "link").symlink_to(out)
    main([str(run.step), str(tmp_path / "link"), "--dtype", "bf16"])
    assert load_file(out / "ema.safetensors")["llm2vae.weight"].dtype == torch.bfloat16
    assert sorted(f.name for f in tmp_path.iterdir()) == ["link", "out"]


def test_an_export_that_was_killed_is_cleared_away(run: Run, tmp_path: Path) -> None:
    draft = tmp_path / "out.weft_draft"
    draft.mkdir()
    (draft / "ema.safetensors").write_bytes(b"half")
    main([str(run.step), str(tmp_path / "out")])
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_tied_embeddings_are_written_twice(tmp_path: Path) -> None:
    """Published loaders untie: they want both, and compute the same."""
    run = Run(tmp_path / "run")
    config = replace(run.source.config, llm=replace(run.source.config.llm, tie_word_embeddings=True))
    source = replace(run.source, config=config)
    model = Bagel(config)
    state = TrainState.create(model, torch.optim.AdamW(model.parameters()), Ema(model, 0.9), num_lanes=1)
    export_model(state, source, tmp_path / "one", "run")
    stored = load_file(tmp_path / "one" / "ema.safetensors")
    head, table = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"
    assert torch.equal(stored[head], stored[table])
    main([str(tmp_path / "one"), str(tmp_path / "two")])
    assert (tmp_path / "one" / "ema.safetensors").read_bytes() == (
        tmp_path / "two" / "ema.safetensors"
    ).read_bytes()
    loaded = load_model(tmp_path / "two").language_model
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(loaded.lm_head.weight, stored[head])
    stored[head] = stored[head] + 1
    save_file(stored, tmp_path / "two" / "ema.safetensors")
    with pytest.raises(
        ValueError, match="lm_head.weight differs from .*, but llm_config.json has tie_word_embeddings true"
    ):
        load_model(tmp_path / "two")


@pytest.mark.parametrize(("text", "expected"), [("5GB", 5 * 10**9), ("1.5 MiB", 3 * 2**19), ("7", 7)])
def test_sizes(text: str, expected: int) -> None:
    assert size(text) == expected


def test_a_size_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["a", "b", "--shard_size", "5GO"])
    assert "'5GO' is no size such as 5GB" in capsys.readouterr().err
