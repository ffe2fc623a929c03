"""Give the detector of a model directory a table of classes: `class_ids` in bagel_config.json, of names, one a line.

    python -m scripts.detection.classes --model_path MODEL --labels labels.txt

Only for a model that is trained from here on: the table takes the place of what says the labels in words.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.tokens import Tokenizer
from train.files import replace_text


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_path", type=Path, required=True)
    parser.add_argument("--labels", type=Path, required=True)
    args = parser.parse_args(argv)
    try:
        names = [n.strip() for n in args.labels.read_text(encoding="utf-8").splitlines() if n.strip()]
        count = give_classes(args.model_path, names)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{args.model_path}: {count} classes")
    return 0


def give_classes(path: Path, names: Sequence[str]) -> int:
    """Write the table; returns how many classes.

    Raises:
        ValueError: if the model has no detector, or two names are the same to its tokenizer.
    """
    file = path / "bagel_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    if "detr" not in config.get("heads", {}):
        raise ValueError(f"{file}: has no heads.detr; add it first")
    tokenizer = Tokenizer(path)
    ids = [tokenizer.encode(name).tolist() for name in names]
    if not ids or len({tuple(x) for x in ids}) < len(ids):
        raise ValueError(f"the labels are {len(names)} names, of which some are the same, or there are none")
    config["heads"]["detr"] |= {"caption": "classes", "class_ids": ids}
    replace_text(file, json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    return len(ids)


if __name__ == "__main__":
    sys.exit(main())
