"""Run files (`--config run.yaml`): lines of `flag: value` over those of the files that `_base_` names.

The trainer checks and converts every flag (`train/config.py`); the tools of data/ take the ones they have as well.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


def run_file_lines(path: Path, including: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str, Any]]:
    """File, flag as written and value of every line; of a flag that comes twice the last counts.

    Args:
        path: of the file; `_base_` is relative to it.
        including: the files that lead to this one.

    Raises:
        ValueError: if a file is missing or is no flat mapping of flags, or includes itself.
    """
    if path.resolve() in including:
        raise ValueError(f"{path}: _base_ leads back to this file")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {path}: cannot be read ({error})") from error
    except yaml.YAMLError as error:
        raise ValueError(f"--config {path}: is not YAML: {' '.join(str(error).split())}") from error
    content = {} if content is None else content
    if not isinstance(content, dict):
        raise ValueError(f"--config {path}: has to be lines of `flag: value`")
    bases = content.pop("_base_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        yield from run_file_lines(path.parent / base, (*including, path.resolve()))
    for key, value in content.items():
        yield path, str(key), value
