"""The published system's numbers on tiny models, number by number: the committed golden cases, and all where they lie beside."""

import json
import shutil
import sys
from collections.abc import Callable, ItemsView, Mapping
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.parity import run
from tests.parity.kinds import KINDS, NOT_BUILT, find_cases, kind_of, run_case

COMMITTED = Path(__file__).parent / "golden"
GOLDEN = next(folder for folder in (run.BESIDE, COMMITTED) if folder.is_dir())
CASES = [c for c in find_cases(GOLDEN) if c.name not in NOT_BUILT]


@pytest.mark.parametrize("case", CASES, ids=lambda c: str(c.relative_to(GOLDEN)))
def test_same_numbers(case: Path) -> None:
    found = run_case(case)
    assert found.rows
    assert not [row for row in found.rows if not row.ok]


def test_every_kind_has_a_committed_case() -> None:
    assert {kind_of(case) for case in find_cases(COMMITTED)} == set(KINDS)


@pytest.mark.skipif(GOLDEN != run.BESIDE, reason="the page is about all cases, and only some are here")
def test_the_page_has_every_case() -> None:
    page = (Path(run.__file__).parents[2] / "docs" / "parity.md").read_text(encoding="utf-8")
    rows = {
        tuple(line.strip("| ").split(" | ")[:2]) for line in page.splitlines() if line.endswith("| yes |")
    }
    assert rows == {(kind_of(case), case.name) for case in CASES}
    assert all(f"- {name}: {why}." in page for name, why in NOT_BUILT.items())
    assert page.count("\n- ") == len(NOT_BUILT)


class _Asked(dict[str, Tensor]):
    """Tensors that remember which of them were asked for."""

    def __init__(self, tensors: Mapping[str, Tensor]):
        super().__init__(tensors)
        self.asked: set[str] = set()

    def __getitem__(self, key: str) -> Tensor:
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Tensor | None = None) -> Tensor | None:  # type: ignore[override]
        self.asked.add(key)
        return super().get(key, default)

    def items(self) -> ItemsView[str, Tensor]:  # type: ignore[override]
        self.asked.update(self)
        return super().items()


WITH_TENSORS = [c for c in CASES if (c / "expected.safetensors").is_file()]


@pytest.mark.parametrize("case", WITH_TENSORS, ids=lambda c: str(c.relative_to(GOLDEN)))
def test_every_expected_tensor_is_looked_at(case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected: list[_Asked] = []

    def remember(file: str | Path) -> Mapping[str, Tensor]:
        if Path(file).name != "expected.safetensors":
            return load_file(file)
        expected.append(_Asked(load_file(file)))
        return expected[-1]

    monkeypatch.setattr(sys.modules[KINDS[kind_of(case) or ""][1].__module__], "load_file", remember)
    run_case(case)
    (tensors,) = expected
    assert tensors and not set(tensors) - tensors.asked


def _tensor(key: str) -> Callable[[Path], str]:
    """Change one number of a tensor: a float by a thousandth of the largest, an integer by one."""

    def change(folder: Path) -> str:
        file = folder / "expected.safetensors"
        tensors = load_file(file)
        flat = tensors[key].flatten()
        flat[len(flat) // 2] += 1e-3 * float(flat.abs().max()) if flat.is_floating_point() else 1
        tensors[key] = flat.reshape(tensors[key].shape)
        save_file(tensors, file)
        return key

    return change


def _json(name: str, *path: str | int) -> Callable[[Path], str]:
    """Change one number of a JSON file by one, or by a thousandth if it is a fraction."""

    def change(folder: Path) -> str:
        content = json.loads((folder / name).read_text())
        at = content
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] += 1 if isinstance(at[path[-1]], int) else 1e-3 * at[path[-1]]
        (folder / name).write_text(json.dumps(content))
        return ""

    return change


CHANGES: Mapping[tuple[str, str], Callable[[Path], str]] = {
    ("bagel/04_edit", "hidden state"): _tensor("last_hidden_state"),
    ("bagel/04_edit", "gradient"): _tensor("grad/vae2llm.weight"),
    ("bagel/04_edit", "gradient norm"): _tensor("grad_norm/connector.fc1.weight"),
    ("bagel/04_edit", "scalar"): _json("expected.json", "scalars", "mse_mean"),
    ("bagel_packer/05_mixed_flex", "padding"): _json("expected.json", "split_lens", -1),
    ("bagel_packer/04_mixed_nested", "sequence"): _json("expected.json", "sequence_length"),
    ("bagel_packer/04_mixed_nested", "index"): _tensor("ce_loss_indexes"),
    ("bagel_packer/04_mixed_nested", "length"): _json("expected.json", "sample_lens", 0),
    ("bagel_packer", "chosen sample"): _json(
        "batch_policy.json", "a_single_group", "batches", 1, "items", 0, 1
    ),
    ("bagel_train_steps/cosine_reweighted", "average"): _tensor("ema_norm/connector.fc1.weight"),
    ("bagel_inference/text_05_stop", "cache"): _tensor("prefill/key_cache.1"),
    ("bagel_inference/text_05_stop", "logits"): _tensor("step_logits"),
    ("bagel_inference/text_05_stop", "token"): _tensor("generated"),
    ("bagel_inference/text_05_stop", "position"): _json("expected.json", "context_after_op", -1, "rope", 0),
    ("bagel_inference/text_05_stop", "place in the cache"): _tensor("op1/packed_key_value_indexes"),
    ("bagel_inference/text_05_stop", "last token"): _json("expected.json", "argmax_of_last_step", 0),
    ("bagel_inference/text_05_stop", "cache at the end"): _json("expected.json", "kv_len_after_generation"),
    ("bagel_inference/text_05_stop", "margin"): _json("expected.json", "min_top1_top2_margin"),
    ("bagel_inference/image_12_taylorseer", "velocity"): _tensor("v_t"),
    ("bagel_inference/image_12_taylorseer", "guidance"): _json(
        "expected.json", "cfg_scales_used_per_step", 3, 1
    ),
    ("bagel_inference/image_11_batch_global", "latents"): _tensor("final_latent_tokens.1"),
    ("bagel_inference/image_11_batch_global", "length"): _json(
        "expected.json", "context_cfg_text", "kv_lens", 1
    ),
    ("bagel_inference/e2e_03_vqa", "token"): _json("expected.json", "generated", 3),
    ("bagel_inference/e2e_03_vqa", "margin"): _json("expected.json", "min_top1_top2_margin"),
    ("bagel_inference/e2e_01_edit", "pixels"): _tensor("decoded_pixels"),
    ("bagel_transforms", "size"): _json("resize_table.json", "parameter_sets", 0, "resized", 0, 1),
    ("bagel_transforms", "mean"): _json("pixels.json", "images", 0, "results", 0, "mean"),
    ("bagel_transforms", "deviation"): _json("pixels.json", "images", 0, "results", 1, "std_per_channel", 2),
    ("bagel_transforms", "size of a picture"): _json("pixels.json", "images", 0, "results", 0, "size_wh", 0),
    ("siglip_navit/rope2d", "output"): _tensor("output"),
    ("vae", "latent"): _tensor("latent_sampled.0"),
    ("schedules", "learning rate"): _json("schedulers.json", "schedules", 0, "lr", 5),
}
"""(committed case, what) -> a change of one expected number of every sort."""


@pytest.mark.parametrize(("case", "what"), CHANGES, ids=lambda x: str(x))
def test_one_changed_number_fails(
    case: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "golden" / case
    # Cases below a case, as in bagel_packer, stay out.
    shutil.copytree(
        COMMITTED / case,
        folder,
        ignore=lambda d, names: [n for n in names if (Path(d) / n / "inputs.json").is_file()],
    )
    if (model := COMMITTED / case / ".." / "model").is_dir():
        (folder.parent / "model").symlink_to(model.resolve())
    assert run.main([str(folder)]) == 0
    key = CHANGES[case, what](folder)
    capsys.readouterr()
    assert run.main([str(folder)]) == 1
    line = json.loads(capsys.readouterr().out)
    wrong = [output["name"] for output in line["outputs"] if not output["ok"]]
    assert not line["ok"] and wrong and (not key or len(wrong) == 1)


def test_a_change_of_every_kind_is_tried() -> None:
    assert {kind_of(COMMITTED / case) for case, _ in CHANGES} == set(KINDS)


def test_what_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main([str(tmp_path / "nothing")]) == 2
    assert "not a golden case" in json.loads(capsys.readouterr().out)["error"]


def test_a_broken_case_does_not_hide_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = tmp_path / "a_good"
    shutil.copytree(COMMITTED / "schedules", good)
    for name, file, content in (
        ("b_no_json", "inputs.json", "{"),
        ("c_no_tensors", "weights_conv.safetensors", "nothing"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / file).write_text(content)
    assert run.main([str(tmp_path)]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line.get("ok") for line in lines] == [True, None, None]
    assert all("error" in line for line in lines[1:])


def test_what_is_not_built_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(COMMITTED / "schedules", tmp_path / "schedules")
    (tmp_path / "grounding").mkdir()
    assert run.main([str(tmp_path)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines if "skipped" in line] == [str(tmp_path / "grounding")]
    assert run.main([str(tmp_path / "grounding")]) == 2  # asked for by name, it cannot be run
    assert "not built" in json.loads(capsys.readouterr().out)["error"]


def test_lines_are_json_where_an_error_is_no_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case = tmp_path / "rope2d"
    shutil.copytree(COMMITTED / "siglip_navit" / "rope2d", case)
    expected = load_file(case / "expected.safetensors")
    expected["output"] = expected["output"][:-1]
    save_file(expected, case / "expected.safetensors")
    assert run.main([str(case)]) == 1

    def no_number(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    line = json.loads(capsys.readouterr().out, parse_constant=no_number)
    assert [(o["absolute"], o["relative"]) for o in line["outputs"] if not o["ok"]] == [(None, None)]
