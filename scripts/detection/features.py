"""A vector per picture for `teacher_sampling: similar_image`: the vision tower's features, averaged over the picture.

python -m scripts.detection.features --model_path MODEL --output features.safetensors pool.jsonl train.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.detection_tools import read_lines
from data.packing import pack
from data.rgb_image import to_rgb
from data.types import Sample
from inference_pipeline.inferencer import Inferencer


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", type=Path, nargs="+", help="detection rows")
    parser.add_argument("--model_path", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--image_root", type=Path, help="where pictures lie; default: beside each file")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(argv)
    try:
        names: dict[str, Path] = {}
        for file in args.files:
            for line in read_lines(file):
                if line.row is None:
                    raise ValueError(line.error)
                for scene in (*line.row.teachers, line.row.student):
                    names[scene.pictures[-1]] = (args.image_root or file.parent) / scene.pictures[-1]
        model = Inferencer.from_model_dir(args.model_path, device=args.device)
        vectors = {name: features(model, path) for name, path in names.items()}
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    args.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(vectors, args.output)
    print(f"{args.output}: {len(vectors)} pictures")
    return 0


@torch.no_grad()
def features(model: Inferencer, path: Path) -> torch.Tensor:
    """`d` float32."""
    with Image.open(path) as opened:
        segment = model.picture(to_rgb(opened).copy())
    decoder = model.decoder
    batch = pack([Sample(segments=(segment,))], decoder.spec, decoder.special).to(decoder.device)
    output = decoder.model(batch, decoder.encoder(batch).noised)
    return output.grids.values.float().mean(0).cpu()


if __name__ == "__main__":
    sys.exit(main())
