"""What the evaluation asks of the model."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from inference_pipeline.evaluate import generate, parse_args
from inference_pipeline.questions import Question


class Recorder:
    """Stands for the model: keeps what it is asked, and draws black pictures."""

    def generate(self, requests: list, **options: Any) -> list[SimpleNamespace]:
        self.options = options
        return [SimpleNamespace(text="", image=Image.new("RGB", (4, 4))) for _ in requests]


@pytest.mark.parametrize(
    ("task", "flags", "scale"),
    [
        ("t2i", ["--cfg_text_scale", "2", "--edit_cfg_text_scale", "1"], 2.0),
        ("edit", ["--cfg_text_scale", "2", "--edit_cfg_text_scale", "1"], 1.0),
        ("edit", ["--cfg_text_scale", "2"], 2.0),
    ],
)
def test_editing_may_have_its_own_guidance(tmp_path: Path, task: str, flags: list[str], scale: float) -> None:
    folders = ["--model_path", str(tmp_path), "--data_dir", str(tmp_path), "--output_dir", str(tmp_path)]
    question = Question(
        sample_id="a", task=task, main_task_type=task, sub_task_type="", text="Draw.", size=(4, 4)
    )
    model = Recorder()
    generate(model, [question], parse_args([*folders, *flags]))  # type: ignore[arg-type]
    assert model.options["cfg_text_scale"] == scale
