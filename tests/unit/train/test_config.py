"""Flags: spellings, types, run files, checks; and the list of flags itself, which changes only on purpose."""

from pathlib import Path

import pytest
import yaml

from train.config import FLAGS, build_args, parse_args

GOLDEN = Path(__file__).parents[2] / "golden" / "flags.txt"
DATA = ["--dataset_config_file", "mix.yaml"]


def flag_lines() -> str:
    lines = [
        f"{row.group:<11}{name:<28}{row.kind:<62}{row.field.default}".rstrip() for name, row in FLAGS.items()
    ]
    return "\n".join(lines) + "\n"


def test_the_flag_list_is_the_one_written_down() -> None:
    assert flag_lines() == GOLDEN.read_text(), (
        f"on purpose? then write flag_lines() to {GOLDEN.name} and CHANGELOG.md"
    )


def test_every_flag_says_what_it_does() -> None:
    for name, row in FLAGS.items():
        assert row.field.metadata["help"].endswith("."), name


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--lr", "3e-4"], "lr", 3e-4),
        (["--lr=3e-4"], "lr", 3e-4),
        (["--max-grad-norm", "0.5"], "max_grad_norm", 0.5),
        (["--freeze_vit"], "freeze_vit", True),
        (["--freeze_vit", "False"], "freeze_vit", False),
        (["--freeze-vit=true"], "freeze_vit", True),
        (["--no_enable_tensorboard"], "enable_tensorboard", False),
        (["--no-recompute"], "recompute", False),
        (["--enable_tensorboard", "False"], "enable_tensorboard", False),
        (["--vit_lr", "None"], "vit_lr", None),
        (["--resume_from", "runs/a-b"], "resume_from", "runs/a-b"),
        (["--sharding_strategy", "FULL_SHARD"], "sharding_strategy", "FULL_SHARD"),
        (["--total_steps", "10", "--total_steps", "20"], "total_steps", 20),
        (["--freeze_vit", "1"], "freeze_vit", True),
        (["--no_freeze_vit"], "freeze_vit", False),
        (["--auto_resume", "No"], "auto_resume", False),
        (["--num_worker", "2"], "num_workers", 2),  # as published scripts write it
        (["--expected-num=100"], "expected_num_tokens", 100),
        (["--zero_stage", "3"], "sharding_strategy", "FULL_SHARD"),
        (["--zero_stage=2", "--sharding_strategy=SHARD_GRAD_OP"], "zero_stage", 2),
        (["--resume_from_ema", "runs/x"], "resume_from", "runs/x"),
        (["--resume_from_ema", "runs/x"], "finetune_from_ema", True),
        (["--resume_from_ema", "runs/x"], "resume_model_only", True),
        (["--max_grad_norm", "1"], "max_grad_norm", 1.0),
    ],
)
def test_spellings(words: list[str], name: str, value: object) -> None:
    flat = parse_args(DATA + words).flat()
    assert flat[name] == value
    assert type(flat[name]) is type(value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rat", "1"], "unknown argument --learning_rat"),
        (["--warmup_step_count", "1"], "did you mean --warmup_steps?"),
        (["--freeze_vits"], "did you mean --freeze_vit?"),
        (["--lr"], "--lr: expected one argument"),
        (["--lr", "fast"], "--lr 'fast' is not float"),
        (["--lr", "nan"], "--lr 'nan' is not float"),
        (["--total_steps", "1.5"], "--total_steps '1.5' is not int"),
        (["--total_steps", "0"], "--total_steps 0 must be at least 1"),
        (
            ["--worker_timeout_s", "600"],
            "--worker_timeout_s 600 is not below --dist_timeout_s 600: over a data worker",
        ),
        (["--max_reject_fraction", "2"], "--max_reject_fraction 2.0 must be from 0 to 1"),
        (["--freeze_vit", "maybe"], "--freeze_vit 'maybe' is not bool"),
        (["--sharding_strategy", "DDP"], "'DDP' is not FULL_SHARD|SHARD_GRAD_OP|HYBRID_SHARD|NO_SHARD"),
        (["--num-lane", "2"], "did you mean --num_lanes?"),  # half of one of our own flags is no flag
        (
            ["--freeze", "True"],
            "--freeze may mean --freeze_llm, --freeze_vit, --freeze_vae, --freeze_und, --freeze_mot_und",
        ),
        (["stray"], "unknown argument stray"),
        (
            ["--expected_num_tokens", "9", "--max_num_tokens", "8"],
            "--expected_num_tokens 9 is more than --max_num_tokens 8",
        ),
        (
            ["--lr_scheduler", "cosine", "--warmup_steps", "9", "--total_steps", "9"],
            "--warmup_steps 9 leaves nothing",
        ),
        (["--lr_scheduler", "cosine", "--lr", "1e-8"], "--min_lr 1e-07 is above --lr 1e-08"),
        (
            ["--lr_scheduler", "wsd", "--warmup_steps", "9", "--total_steps", "10"],
            "--warmup_steps 9 is longer than the 8",
        ),
        (["--decay_steps", "9"], "--decay_steps 9 is for --lr_scheduler wsd, not constant"),
        (["--resume_model_only"], "--resume_model_only needs --resume_from"),
        (
            ["--resume_from_ema", "a", "--resume_from", "b"],
            "--resume_from_ema a means --resume_from a, but --resume_from b is given",
        ),
        (
            ["--zero_stage", "3", "--sharding_strategy", "HYBRID_SHARD"],
            "--zero_stage 3 means --sharding_strategy FULL_SHARD, but --sharding_strategy HYBRID_SHARD is given",
        ),
        (["--use_flex", "--attention", "split"], "--use_flex means --attention flex, but --attention split"),
        (
            ["--finetune_from_hf", "--llm_path", "hf/Qwen2.5"],
            "--finetune_from_hf True takes the model of --model_path hf/BAGEL-7B-MoT; hf/Qwen2.5 (--llm_path, --vit_path)",
        ),
        (["--vit_select_layer", "0"], "--vit_select_layer 0 must be at most -1"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read"),
    ],
)
def test_mistakes_are_named(words: list[str], message: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_args(DATA + words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_mixture_is_required() -> None:
    with pytest.raises(ValueError, match="--dataset_config_file is required"):
        parse_args([])


def test_run_files_inherit_and_the_command_line_wins(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("lr: 1e-3\nema: 0.5\nfreeze_vit: true\nresume_from: null\n")
    (tmp_path / "sub").mkdir()
    run = tmp_path / "sub" / "run.yaml"
    run.write_text("_base_: ../base.yaml\ndataset-config-file: a.yaml\nema: 1\ntotal_steps: 7\n")
    args = parse_args(["--config", str(run), "--total_steps", "9"])
    assert (args.optim.lr, args.optim.ema, args.params.freeze_vit, args.optim.total_steps) == (
        1e-3,
        1.0,
        True,
        9,
    )
    assert args.data.dataset_config_file == "a.yaml"
    assert isinstance(args.optim.ema, float)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "unknown key 'learning_rate'"),
        ("warmup-step: 1", "unknown key 'warmup-step'; did you mean warmup_steps?"),
        ("lr: [1]", r"lr: \[1\] is not float"),
        ("total_steps: 1.5", "total_steps: 1.5 is not int"),
        ("num_workers: true", "num_workers: True is not int"),
        ("lr: null", "lr: None is not float"),
        ("- lr", "lines of `flag: value`"),
        ("lr: {", "is not YAML"),
        ("_base_: run.yaml", "leads back to this file"),
        ("_base_: gone.yaml", "gone.yaml: cannot be read"),
    ],
)
def test_run_file_mistakes_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        parse_args(["--config", str(tmp_path / "run.yaml")])


def test_print_config_gives_a_run_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_args(
            [*DATA, "--lr", "0.5", "--print-config"], about=lambda args: f"the rate\nis {args.optim.lr}"
        )
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert printed.endswith("# the rate\n# is 0.5\n")
    assert list(yaml.safe_load(printed)) == list(FLAGS)
    (tmp_path / "run.yaml").write_text(printed)
    assert parse_args(["--config", str(tmp_path / "run.yaml")]) == build_args(
        {"dataset_config_file": "mix.yaml", "lr": 0.5}
    )


def test_a_strict_file_has_every_key(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args([*DATA, "--lr", "5e-7", "--print_config"])
    whole = capsys.readouterr().out
    file = tmp_path / "whole.yaml"
    file.write_text(whole)
    strict = ["--config", str(file), "--strict_config"]
    assert parse_args(strict).optim.lr == 5e-7
    kept = [line for line in whole.splitlines() if not line.startswith(("lr:", "freeze_vit:"))]
    file.write_text("\n".join(kept) + "\n")
    with pytest.raises(ValueError, match=rf"lacks 2 of {len(FLAGS)} keys: .*; --print_config prints") as e:
        parse_args(strict)
    assert "freeze_vit" in str(e.value) and " lr" in str(e.value)
    file.write_text("_base_: base.yaml\nlr: 1e-4\nfreeze_vit: off\ntotal_steps: 1e3\n")
    (tmp_path / "base.yaml").write_text("\n".join(kept) + "\n")
    args = parse_args(strict)
    assert (args.optim.lr, args.params.freeze_vit, args.optim.total_steps) == (1e-4, False, 1000)
    with pytest.raises(ValueError, match="--strict_config needs --config"):
        parse_args([*DATA, "--strict_config"])


def test_help_shows_every_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in FLAGS)
