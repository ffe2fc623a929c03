"""Adapters: what they say is what PEFT reads, what inference adds up and what an export holds; frozen bases; refusals."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from modeling.build import load_model
from modeling.source import read_source
from scripts.convert.export import main as export
from tests.unit.modeling.tiny import made_up_latents, numbers
from tests.unit.train.adapting import args_of, built, packs, train, write_directory
from train.checkpoint import Checkpoints, Start
from train.distributed.dcp import StoredTensors
from train.tuning import tuning_of

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt", "ignore:.*builtin type Swig")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_directory(tmp_path_factory.mktemp("adapting") / "base")


@torch.no_grad()
def outputs(model: nn.Module) -> dict[str, Tensor]:
    batch = packs(1)[0]
    out = model.eval()(batch, made_up_latents(batch).noised)
    heads = {name: numbers(h) for name, h in out.heads.items()}
    return {"logits": out.logits, "velocity": out.velocity, **heads}


def apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((x - other[name]).abs().max()) for name, x in one.items())


@pytest.mark.parametrize("kind", ["ema", "model"])
def test_peft_inference_and_a_merged_export_agree(base: Path, tmp_path: Path, kind: str) -> None:
    args = args_of(base, tmp_path / "run", gradient_accumulation_steps=2, lora_modules_to_save="box")
    tuning, state = built(args)
    before = outputs(load_model(base, "model"))
    assert apart(outputs(state.model), before) < 1e-5, "fresh adapters change nothing"
    state.model.train()
    train(args, state)
    tuning.export(state)
    folder = tmp_path / "run" / "adapter" / kind
    trained = load_file(folder / "adapter_model.safetensors")
    assert all(".lora_" in name or name.startswith("base_model.model.heads.box.") for name in trained)

    found = outputs(load_model(base, kind, adapter=tmp_path / "run" / "adapter"))
    assert apart(found, before) > 1e-3
    if kind == "model":
        # Largest outputs are about 10; worst measured 3.8e-6.
        assert apart(found, outputs(state.model)) < 1e-4
    theirs = PeftModel.from_pretrained(load_model(base, "model"), str(folder))
    assert apart(found, outputs(theirs.get_base_model())) < 1e-4
    export([str(tmp_path / "run" / "adapter"), str(tmp_path / "out"), "--merge", "--weights", kind])
    assert apart(found, outputs(load_model(tmp_path / "out", kind))) < 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_in_few_bits_is_trained_beside_and_added_up(base: Path, tmp_path: Path, bits: int) -> None:
    args = args_of(
        base,
        tmp_path / "run",
        gradient_accumulation_steps=2,
        **{f"load_in_{bits}bit": True},
        lora_target="llm_all",
    )
    tuning, state = built(args)
    state.model.train()
    losses = train(args, state, steps=4)
    assert losses[-1] < losses[0]
    quantised = {n for n, p in state.model.named_parameters() if p.dtype in (torch.uint8, torch.int8)}
    assert len(quantised) == 2 * 2 * 7
    assert not {f"model.{n}" for n in quantised} & state.tensors().keys()
    tuning.export(state)
    found = outputs(load_model(base, "model", adapter=tmp_path / "run" / "adapter"))
    # 8 bits round activations too, which what is added up does not.
    assert apart(found, outputs(state.model)) < (1e-4 if bits == 4 else 0.3)
    record = tmp_path / "run" / "adapter" / "model" / "weft_adapter.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "precision": None}))
    assert apart(outputs(load_model(base, "model", adapter=record.parent)), found) > 1e-2
    train(args, state, steps=1)  # a pass for inference in between leaves nothing behind


def test_a_run_goes_on_from_its_checkpoint(base: Path, tmp_path: Path) -> None:
    args = args_of(
        base, tmp_path / "run", gradient_accumulation_steps=2, lora_dropout=0.5, lora_modules_to_save="box"
    )
    tuning, state = built(args)
    state.model.train()
    train(args, state)
    checkpoints = Checkpoints(tmp_path / "steps", 0, args.flat())
    checkpoints.beside = tuning.snapshot
    step = checkpoints.save(state)
    stored = StoredTensors(step / "state").shapes
    assert all(".lora_" in name or ".heads.box." in name for name in stored)
    assert len(stored) == 5 * sum(p.requires_grad for p in state.model.parameters())
    expected = train(args, state)

    again_tuning, again = built(args)
    again.model.train()
    checkpoints.restore(again, Start(path=step))
    assert train(args, again) == expected
    one, other = (dict(s.model.named_parameters()) for s in (state, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    export([str(step), str(tmp_path / "out"), "--merge"])
    assert apart(
        outputs(load_model(tmp_path / "out")), outputs(load_model(base, adapter=step / "adapter" / "ema"))
    ) == pytest.approx(0, abs=1e-5)
    begun = built(replace(args, lora=replace(args.lora, lora_resume_path=str(step / "adapter" / "model"))))[1]
    last = load_file(step / "adapter" / "model" / "adapter_model.safetensors")
    for name, p in begun.model.named_parameters():
        if ".lora_" in name:
            assert torch.equal(p, last[f"base_model.model.{name.replace('.default', '')}"])


def test_frozen_weights_in_the_precision_of_computing_change_nothing(base: Path, tmp_path: Path) -> None:
    flags = {"gradient_accumulation_steps": 2, "param_dtype": "bf16"}
    bits = []
    for dtype in ("fp32", "bf16"):
        args = args_of(base, tmp_path / dtype, **flags, frozen_dtype=dtype)
        model = built(args)[1].model
        frozen = {p.dtype for p in model.parameters() if not p.requires_grad}
        assert frozen == {torch.bfloat16 if dtype == "bf16" else torch.float32}
        assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
        bits.append({n: p.detach().bfloat16() for n, p in model.named_parameters()})
    assert all(torch.equal(x, bits[1][name]) for name, x in bits[0].items())


BAD: dict[str, tuple[dict[str, object], str]] = {
    "unknown target": (
        {"lora_target": "mot_unt"},
        "--lora_target mot_unt: is none of .* did you mean mot_und",
    ),
    "no such matrices": ({"lora_target": r"re:nothing\..+"}, "the model has no such matrices"),
    "no pattern": ({"lora_target": "re:("}, "is no regular expression"),
    "output layer": ({"lora_target": "re:language_model.lm_head"}, "means language_model.lm_head"),
    "nothing": ({"lora_target": ""}, "--lora_target: names nothing; choose from llm_attn"),
    "both widths": ({"load_in_4bit": True, "load_in_8bit": True}, "a matrix is in one of them"),
    "bits without": (
        {"lora_enable": False, "load_in_4bit": True},
        "--load_in_4bit True: is for --lora_enable",
    ),
    "width": ({"load_in_4bit": True, "quant_target": "vit"}, "multiple of 32 wide, and this one is 24"),
    "from scratch": ({"from_scratch": True}, "--from_scratch True: adapters are a difference"),
    "frozen and adapted": ({"freeze_vit": True}, "--freeze_vit True: keeps vit_model"),
    "detached": ({"freeze_und": True, "lora_target": "mot_und"}, "--freeze_und True: keeps language_model"),
    "whole and adapted": (
        {"lora_modules_to_save": "vit"},
        "--lora_modules_to_save vit: would train as a whole",
    ),
    "whole and few bits": (
        {"lora_modules_to_save": "llm_gen", "lora_target": "mot_und", "load_in_8bit": True},
        "--lora_modules_to_save llm_gen: would train as a whole what --quant_target",
    ),
    "frozen dtype": ({"frozen_dtype": "bf16"}, "--frozen_dtype bf16: nothing would be computed in it"),
    "no adapters": ({"lora_resume_path": "/nowhere"}, "/nowhere: holds no adapters"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_refused_by_one_line(base: Path, tmp_path: Path, case: str) -> None:
    flags, message = BAD[case]
    with pytest.raises(ValueError, match=message) as error:
        built(args_of(base, tmp_path / "run", **flags))
    assert "\n" not in str(error.value)


def test_adapters_are_for_the_weights_they_were_trained_on(base: Path, tmp_path: Path) -> None:
    args = args_of(base, tmp_path / "run")
    tuning, state = built(args)
    tuning.export(state)
    adapter = tmp_path / "run" / "adapter"
    with pytest.raises(ValueError, match="the weights of --model_path .* are others"):
        built(args_of(base, tmp_path / "b", lora_resume_path=str(adapter), finetune_from_ema=True))
    with pytest.raises(ValueError, match=r"first at .* \(rank 4 there, 8 here\)"):
        built(args_of(base, tmp_path / "b", lora_resume_path=str(adapter), lora_r=8))
    with pytest.raises(ValueError, match="holds adapters .*; add --merge"):
        run_export([str(adapter), str(tmp_path / "out")])
    with pytest.raises(ValueError, match="holds no adapters"):
        run_export([str(base), str(tmp_path / "out"), "--merge"])
    (adapter / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds notes.txt, which no run has written"):
        tuning.require_room()


def test_checkpoints_of_the_other_kind_are_refused(base: Path, tmp_path: Path) -> None:
    for has, wants, message in (
        (True, False, "holds adapters; continue it with --lora_enable True"),
        (False, True, "is a checkpoint of a whole model; export it"),
    ):
        args = args_of(base, tmp_path / "run", lora_enable=wants)
        step = tmp_path / f"{has}"
        step.mkdir()
        (step / "args.json").write_text(json.dumps({"lora_enable": has}))
        with pytest.raises(ValueError, match=message):
            tuning_of(args, read_source(base), Start(path=step))
    with pytest.raises(
        ValueError, match="holds whole weights; with --lora_enable name them with --model_path"
    ):
        tuning_of(args, read_source(base), Start(path=base, published=True))


def run_export(words: list[str]) -> None:
    from scripts.convert.export import export as run
    from scripts.convert.export import parse_args

    run(parse_args(words))


def change_config(edit: Callable[[dict], object], folder: Path) -> None:
    file = folder / "adapter_config.json"
    values = json.loads(file.read_text())
    edit(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(peft_type="IA3"), "peft_type is IA3; LORA alone"),
        (lambda c: c.update(use_dora=True), "use_dora is True, which is not read here"),
        (lambda c: c.update(r=3), "needs A and B of rank 3"),
        (lambda c: c.update(r="many"), "whole numbers above 0"),
    ],
)
def test_other_adapters_are_refused(base: Path, tmp_path: Path, edit: Callable, message: str) -> None:
    tuning, state = built(args_of(base, tmp_path / "run"))
    tuning.export(state)
    change_config(edit, tmp_path / "run" / "adapter" / "ema")
    with pytest.raises(ValueError, match=message):
        load_model(base, adapter=tmp_path / "run" / "adapter")
