"""What the whole tree keeps to: imports point down, one place knows of processes, the core needs the core's packages only."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

MAY_IMPORT = {
    "data": {"data", "modeling.optional"},
    "modeling": {"modeling", "data.types", "data.layout", "data.tokens", "data.packing"},
    "train": {"train", "modeling", "data"},
    "inference_pipeline": {"inference_pipeline", "train", "modeling", "data"},
    "scripts": {"scripts", "inference_pipeline", "train", "modeling", "data"},
}
"""Package -> what its modules may import of ours: a package, or single leaf modules of one."""

CORE = {
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "einops",
    "yaml",
    "numpy",
    "PIL",
    "webdataset",
    "tensorboard",
}
"""Import names of requirements.txt."""

OPTIONAL = (
    "torchvision", "timm", "diffusers", "peft", "bitsandbytes", "liger_kernel", "flash_attn", "sklearn", "skimage", "scipy",
    "matplotlib", "wandb", "pycocotools", "pyarrow", "av", "numba", "simplejpeg", "isal",
    "pydicom", "nibabel", "faster_coco_eval",
)  # fmt: skip

WRITTEN = (
    "*.py",
    "*.md",
    "*.yaml",
    "*.yml",
    "*.toml",
    "*.txt",
    "*.sh",
    "*.css",
    "*.svg",
    "*.json",
    "Makefile",
    "run",
)


def modules() -> list[Path]:
    return [file for package in MAY_IMPORT for file in sorted((ROOT / package).rglob("*.py"))]


def imports(file: Path) -> Iterator[tuple[str, int, bool]]:
    """(dotted name, line, at module level) of everything a file imports; `from a import b` gives `a` and `a.b`."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        top = node in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}:{node.lineno}: imports are absolute"
            yield str(node.module), node.lineno, top
            yield from ((f"{node.module}.{alias.name}", node.lineno, top) for alias in node.names)


def is_inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_imports_point_down() -> None:
    broken = []
    for file in modules():
        package = file.relative_to(ROOT).parts[0]
        for name, line, _ in imports(file):
            ours = name.split(".")[0] in MAY_IMPORT
            if ours and not any(is_inside(name, allowed) for allowed in MAY_IMPORT[package]):
                broken.append(f"{file.relative_to(ROOT)}:{line} imports {name}")
    assert not broken, f"see the table of imports in docs/architecture.md: {broken}"


def test_only_train_distributed_knows_of_processes() -> None:
    broken = []
    for file in modules():
        if (ROOT / "train" / "distributed") in file.parents:
            continue
        broken += [
            f"{file}:{line}" for name, line, _ in imports(file) if is_inside(name, "torch.distributed")
        ]
        written = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        broken += [
            f"{file}:{n.lineno}"
            for n in written
            if isinstance(n, ast.Attribute) and ast.unparse(n) == "torch.distributed"
        ]
    assert not broken, f"call a function of train/distributed/ instead: {broken}"


def test_modules_import_the_core_only() -> None:
    known = CORE | set(MAY_IMPORT) | set(sys.stdlib_module_names)
    broken = [
        f"{file.relative_to(ROOT)}:{line} imports {name}"
        for file in modules()
        if file.relative_to(ROOT).parts[0] != "scripts"  # a script may need what its extra brings
        for name, line, at_module_level in imports(file)
        if at_module_level and name.split(".")[0] not in known
    ]
    assert not broken, f"import it where it is used, through modeling.optional.require: {broken}"


def test_entries_work_without_optional_packages() -> None:
    # None in sys.modules is how Python itself marks a module that cannot be imported; find_spec answers None as well.
    entries = "train.main, train.main_autoencoder, inference_pipeline.inferencer, data.inspect, data.check"
    code = f"import sys; sys.modules.update(dict.fromkeys({OPTIONAL!r})); import {entries}; print('imported')"
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100, check=False)
    assert run.stdout.strip() == "imported", run.stderr


def test_nothing_names_the_machine_it_was_written_on() -> None:
    # Home directories, and the place of this very checkout.
    place = re.compile(
        rf"/(?:root|home|Users)/\w|{re.escape(str(ROOT))}/"
        if len(ROOT.parts) > 2
        else r"/(?:root|home|Users)/\w"
    )
    folders = [ROOT / name for name in (*MAY_IMPORT, "configs", "docs", "tests", "benchmarks", ".ci")]
    files = [f for folder in folders for pattern in WRITTEN for f in folder.rglob(pattern)]
    files += [f for pattern in WRITTEN for f in ROOT.glob(pattern)]
    found = [
        f"{file.relative_to(ROOT)}:{number}"
        for file in files
        if file != Path(__file__) and file.is_file()
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if place.search(line)
    ]
    assert len(files) > 100 and not found, found
