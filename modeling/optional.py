"""Packages that the core does not need: imported where they are used, each through this one guard.

Usage: `timm = require("timm", package="timm", extra="vision", why="the SAM image encoder")`.
"""

import importlib
from types import ModuleType


def require(module: str, *, package: str, extra: str, why: str) -> ModuleType:
    """Import an optional module or say how to install it.

    Args:
        module: dotted name to import, such as `sklearn.svm`.
        package: its name on the package index.
        extra: the group of `pyproject.toml` that holds it.
        why: what needs it, for people ("the QLoRA recipe").

    Raises:
        ImportError: if the package is absent (or is installed and cannot be imported, with its own reason).
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and (module == error.name or module.startswith(f"{error.name}.")):
            raise ImportError(
                f"{why} needs {package}, which is not installed: {_remedy(package, extra)}"
            ) from error
        raise ImportError(
            f"{why} needs {package}, which lacks {error.name}: {_remedy(package, extra)}"
        ) from error
    except (
        ImportError,
        OSError,
        RuntimeError,
    ) as error:  # a build for another torch or without its driver fails like this
        raise ImportError(
            f"{why} needs {package}, which is installed but cannot be imported ({error}): {_remedy(package, extra)}"
        ) from error


def _remedy(package: str, extra: str) -> str:
    return f'run `pip install {package}`, or `pip install -e ".[{extra}]"` in the project\'s directory'


def if_installed(module: str) -> ModuleType | None:
    """An optional module that only makes something faster; None if it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, OSError, RuntimeError):
        return None
