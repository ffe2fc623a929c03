"""The worked example of CONTRIBUTING.md, followed to the letter: one file and one registry row make a task of the mixture."""

import importlib.util
import re
import shlex
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from data import inspect
from data.dataset_info import DATASET_REGISTRY
from data.layout import LayoutSpec
from data.mixture import build_groups, load_mixture
from data.policy import PackBudget
from data.stream import LaneStream, StreamPlan
from data.tokens import Tokenizer
from data.types import LaneCursor
from tests.e2e.conftest import Quickstart

ROOT = Path(__file__).parents[2]
EXAMPLE = (ROOT / "CONTRIBUTING.md").read_text().partition("### A seventh task")[2].partition("\n## ")[0]


def block(language: str, number: int = 0) -> str:
    """One of the example's code blocks, without the indentation of the list it stands in."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", EXAMPLE, re.DOTALL | re.MULTILINE)
    assert len(found) > number, f"CONTRIBUTING.md: no {language} block {number + 1} under its seventh task"
    indentation, code = found[number]
    return re.sub(rf"^{indentation}", "", code, flags=re.MULTILINE)


def load_module(file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def mixture(quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The example's three steps, as written there: the file, the row, the two additions to the quickstart's YAML."""
    file = tmp_path / "a_new_dataset.py"
    file.write_text(block("python"))
    row = re.fullmatch(r'"(\w+)": (\w+),\n', block("python", 1))
    assert row, "CONTRIBUTING.md: the seventh task's second block is no row of DATASET_REGISTRY"
    monkeypatch.setitem(DATASET_REGISTRY, row[1], getattr(load_module(file), row[2]))

    monkeypatch.setenv("WEFT_DATA", str(quickstart.data))
    place, group = block("yaml").split("\n\n")
    published = (ROOT / "configs" / "quickstart.yaml").read_text()
    assert published.count("dataset_info:\n") == 1
    copy = tmp_path / "quickstart.yaml"
    copy.write_text(published.replace("dataset_info:\n", f"dataset_info:\n{place}\n") + "\n" + group)
    return copy


def test_the_example_of_contributing_makes_a_task(mixture: Path, quickstart: Quickstart) -> None:
    tokenizer = Tokenizer(quickstart.model)
    groups = build_groups(load_mixture(mixture), tokenizer)
    assert [group.name for group in groups] == ["vqa", "refer", "t2i", "edit", "text", "caption"]
    plan = StreamPlan(
        groups=groups,
        layout=LayoutSpec.from_model_dir(quickstart.model),
        special=tokenizer.special,
        budget=PackBudget(expected=3900, maximum=4300, per_sample=1000),
        seed=0,
        num_lanes=1,
    )
    pack = LaneStream(plan, LaneCursor(lane=0)).next_pack()
    assert {"caption", "vqa", "refer", "t2i"} <= {origin.group for origin in pack.origins}
    assert "caption" in pack.tasks
    assert not pack.rejects

    caption = groups[-1]
    record = caption.source.read(0)
    picture, request, answer = caption.dataset.to_sample(record, np.random.default_rng(0)).segments
    assert (picture.kind, picture.pixels.shape) == ("und_image", (3, 64, 64))
    assert (tokenizer.decode(request.ids), request.supervised) == ("What is here?", False)
    assert (tokenizer.decode(answer.ids), answer.supervised) == (record.data["json"]["caption"], True)


def test_its_command_shows_the_new_samples(
    mixture: Path, quickstart: Quickstart, capsys: pytest.CaptureFixture[str]
) -> None:
    command = re.search(r"`python -m data\.inspect (.*?)`", EXAMPLE)
    assert command, "CONTRIBUTING.md does not say how to look at the new samples"
    flags = [str(mixture) if word == "configs/quickstart.yaml" else word for word in shlex.split(command[1])]
    assert (
        inspect.main(
            [*flags, "--model_path", str(quickstart.model), "--out", str(mixture.parent / "pack.png")]
        )
        == 0
    )
    assert "What is here?" in capsys.readouterr().out
