"""One run with all that is looked at beside training: validation, samples, norms, phases, a profile, the best checkpoint."""

import json
from pathlib import Path

import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import Quickstart
from tests.e2e.trainer import run_trainer


def with_validation(quickstart: Quickstart, file: Path) -> Path:
    """The quickstart's mixture with held-out pictures to answer about and to draw."""
    mixture = yaml.safe_load(quickstart.mixture.read_text())
    for named in mixture["dataset_info"].values():
        for name, place in list(named.items()):
            named[f"{name}_val"] = {key: value.replace("_train", "_val") for key, value in place.items()}
    mixture["val"] = {
        name: {"dataset_names": [f"{mixture[name]['dataset_names'][0]}_val"]} for name in ("vqa", "t2i")
    }
    file.write_text(yaml.safe_dump(mixture, sort_keys=False))
    return file


def test_what_is_seen_of_a_run(quickstart: Quickstart, tmp_path: Path) -> None:
    done = run_trainer(
        tmp_path, dataset_config_file=with_validation(quickstart, tmp_path / "mixture.yaml"), model_path=quickstart.model,
        results_dir="out", num_workers=0, enable_tensorboard=True, norms_every=1, profile_steps="2:3", keep_best="val/ce",
        val_every=1, val_steps=2, val_samples=1, val_samples_every=1, val_num_timesteps=2, val_max_new_tokens=2,
    )  # fmt: skip
    assert done.code == 0, done.output
    out = tmp_path / "out"
    validated = [json.loads(line) for line in (out / "val_log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in validated] == [1, 2]
    assert {"val/ce", "val/mse", "val/loss", "val/vqa/ce", "val/t2i/mse", "val/psnr"} <= set(validated[0])
    assert json.loads((out / "checkpoints" / "best.json").read_text())["step"] == 2
    for step in ("0000001", "0000002"):
        assert {p.name for p in (out / "samples" / step).iterdir()} == {"vqa.png", "t2i.png", "answers.json"}
    assert {"trace.0.json", "trace.1.json"} < {p.name for p in (out / "profile").iterdir()}

    trained = [json.loads(line) for line in (out / "train_log.jsonl").read_text().splitlines()]
    phases = trained[0]["phases"]
    assert (
        set(phases) == {"data", "forward", "backward", "communication", "optimizer"}
        and trained[0]["mem_rss"] > 50
    )
    board = EventAccumulator(str(out / "tensorboard"))
    board.Reload()
    scalars = set(board.Tags()["scalars"])
    published = {"ce", "mse", "lr", "total_mse_tokens", "total_ce_tokens", "total_norm", "total_samples"}
    published |= {"tokens_per_sec", "tokens_per_step", "actual_tflops"}
    assert (
        published | {"gn/llm_gen", "wn/vit", "time/step", "time/communication", "val/ce", "mem_rss"}
        <= scalars
    )
    assert set(board.Tags()["images"]) == {"val/vqa", "val/t2i"}
