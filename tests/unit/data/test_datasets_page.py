"""docs/datasets.md names every class, option, key and row there is, and its examples are read."""

import re
from dataclasses import fields
from pathlib import Path

import pytest

from data import rows
from data.dataset_info import DATASET_REGISTRY
from data.mixture import GROUP_KEYS, load_mixture
from data.sources import LOCATION_KEYS

PAGE = (Path(__file__).parents[3] / "docs" / "datasets.md").read_text(encoding="utf-8")
TABLES = [v for v in vars(rows).values() if isinstance(v, type) and v.__name__.endswith("Row")]


def section(title: str) -> str:
    return PAGE.split(f"## {title}\n")[1].split("\n## ")[0]


def test_every_class_and_option_is_on_the_page():
    missing = [n for n in DATASET_REGISTRY if f"`{n}`" not in section("Classes")]
    options = {o for c in DATASET_REGISTRY.values() for o in c.options()} - set(GROUP_KEYS)
    missing += [o for o in sorted(options) if f"`{o}`" not in section("Classes")]
    assert not missing


def test_every_key_of_groups_and_places_is_on_the_page():
    missing = [k for k in GROUP_KEYS if f"`{k}`" not in section("The mixture")]
    missing += [k for k in LOCATION_KEYS if f"`{k}`" not in section("Where data lies")]
    assert not missing


def blocks() -> dict[str, str]:
    """Lines of each row's table, by its name."""
    found: dict[str, str] = {}
    name = ""
    for line in section("Rows").splitlines():
        if begins := re.match(r"\| `(\w+Row)` \|", line):
            name = begins[1]
        found[name] = found.get(name, "") + line + "\n"
    return found


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_on_the_page(table):
    bases = [t.__name__ for t in table.__mro__ if t in TABLES]
    text = "".join(blocks()[name] for name in bases)
    assert all(f"`{base}`" in blocks()[table.__name__] for base in bases[:2])
    for f in fields(table):
        rule = f.metadata["column"]
        assert all(f"`{key}`" in text for key in rule.keys), f"{table.__name__}: {rule.keys}"
        assert rule.default is not rows.REQUIRED or f"`{rule.reason}`" in text


@pytest.mark.parametrize("example", re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
def test_the_examples_are_read(example, tmp_path):
    (tmp_path / "mix.yaml").write_text(example)
    groups = load_mixture(tmp_path / "mix.yaml")
    assert [s.dataset for g in groups for s in g.sources] == ["bone_suppression", "low_dose_ct"]
    assert [(s.start, s.end) for g in groups for s in g.sources] == [(0, None), (0, 5000)]
