"""Runs the builders of indexes: for many bytes in processes of their own, in parallel, which give back all memory at their end.

Each process runs `serve`, takes `{"builder", "path", "out"}` lines and answers with `{"done": bytes}` while it reads,
then `{"built": out}` or `{"error": message}`. They are plain children: multiprocessing would import the trainer in each of
them, or start its fork server before the loader has said what that shall import.
"""

import contextlib
import importlib
import json
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from data.sources.record import brief
from data.sources.storage import START_RETRY_AFTER_S, asked_again, is_remote, may_pass

ROOT = Path(__file__).resolve().parents[2]

Arrays = Mapping[str, np.ndarray]
"""Of one file: int64 and uint8, one axis each; `count`, of one number, is how many records the file has."""

Tick = Callable[[int], None]
"""Told now and then how many bytes have been read."""

Builder = Callable[[str, Tick], Arrays]
"""Reads a file once and says where its records lie; raises `ValueError` or `OSError` if it is not what it should be."""

TICK_S = 1.0


def builder_name(build: Builder) -> str:
    """How a process finds the builder."""
    return f"{build.__module__}:{build.__qualname__}"


def build_file(build: Builder, path: str, tick: Tick) -> Arrays:
    """The arrays of one file.

    Raises:
        ValueError: if the file cannot be read or is not what it should be.
    """
    last = time.monotonic()

    def now_and_then(done: int) -> None:
        nonlocal last
        if time.monotonic() - last >= TICK_S:
            last = time.monotonic()
            tick(done)

    pauses = START_RETRY_AFTER_S if is_remote(path) else ()
    try:
        arrays = asked_again(lambda: build(path, now_and_then), path, pauses, may_pass)
    except ValueError:
        raise
    except ImportError as e:  # a package for the format or the store
        raise ValueError(str(e)) from e
    except Exception as e:
        if isinstance(e, OSError) or is_remote(path):  # every remote file system raises its own errors
            raise ValueError(f"{path}: cannot be read ({brief(e)})") from e
        raise
    return {name: np.ascontiguousarray(a) for name, a in arrays.items()}


def build_in_processes(
    build: Builder, paths: Sequence[str], progress: Callable[[str, int], None]
) -> list[Arrays]:
    """What `build_file` gives for each path.

    Raises:
        ValueError: if a file is not what it should be.
        RuntimeError: if a process died.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(len(paths), max(1, cores))
    with tempfile.TemporaryDirectory(prefix="weft-index-") as folder, contextlib.ExitStack() as children:
        idle: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        for _ in range(count):
            child = subprocess.Popen(
                [sys.executable, "-c", "from data.sources.building import serve; serve()"],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            children.callback(_end, child)
            idle.put(child)

        def build_one(number: int) -> Arrays:
            child, out = idle.get(), f"{folder}/{number}.npz"
            try:
                return _ask(child, builder_name(build), paths[number], out, progress)
            finally:
                idle.put(child)

        with ThreadPoolExecutor(count) as pool:
            results = [pool.submit(build_one, i) for i in range(len(paths))]
            try:
                return [result.result() for result in results]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                children.close()  # ends those that still read
                raise


def _ask(
    child: "subprocess.Popen[str]", builder: str, path: str, out: str, progress: Callable[[str, int], None]
) -> Arrays:
    assert child.stdin is not None and child.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # told below
        child.stdin.write(json.dumps({"builder": builder, "path": path, "out": out}) + "\n")
        child.stdin.flush()
    for line in child.stdout:
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        if "built" in answer:
            with np.load(answer["built"], allow_pickle=False) as saved:
                arrays = {name: saved[name] for name in saved.files}
            os.unlink(answer["built"])
            return arrays
        progress(path, answer["done"])
    raise RuntimeError(f"{path}: the process that indexed it died (exit code {child.wait()})")


def _end(child: "subprocess.Popen[str]") -> None:
    assert child.stdin is not None and child.stdout is not None
    child.kill()  # it has nothing to put in order
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    child.stdout.close()
    child.wait()


def serve() -> None:
    """Build what standard input asks for, until it ends."""

    def answer(**content: object) -> None:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()

    for line in sys.stdin:
        task = json.loads(line)
        module, _, name = task["builder"].partition(":")
        build = getattr(importlib.import_module(module), name)
        try:
            arrays = build_file(build, task["path"], lambda done: answer(done=done))
        except ValueError as e:
            answer(error=str(e))
            continue
        with open(task["out"], "wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]
        answer(built=task["out"])
