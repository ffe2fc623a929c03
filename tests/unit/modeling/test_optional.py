"""The guard of optional imports: the module, or one line that says what to install."""

import sys
from pathlib import Path

import pytest

from modeling.optional import require


def test_gives_the_module() -> None:
    assert require("json.decoder", package="json", extra="demo", why="a test") is sys.modules["json.decoder"]


def test_an_absent_package_is_named_with_the_remedy() -> None:
    with pytest.raises(ImportError) as caught:
        require("no_such_thing.part", package="no-such-thing", extra="vision", why="the test recipe")
    assert str(caught.value) == (
        "the test recipe needs no-such-thing, which is not installed: run `pip install no-such-thing`, "
        'or `pip install -e ".[vision]"` in the project\'s directory'
    )


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("import absent_dependency", "needs broken, which lacks absent_dependency"),
        ("raise RuntimeError('no driver')", r"installed but cannot be imported \(no driver\)"),
        ("raise ImportError('wrong version')", r"installed but cannot be imported \(wrong version\)"),
    ],
)
def test_a_broken_package_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    (tmp_path / "broken.py").write_text(body)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ImportError, match=message):
        require("broken", package="broken", extra="quant", why="a test")
    sys.modules.pop("broken", None)
