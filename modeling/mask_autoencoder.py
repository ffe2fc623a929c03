"""The mask autoencoder: a mask of fixed size -> a code -> its logits (PerceptionGPT, arXiv 2311.06612).

`train/main_mask_autoencoder.py` trains it; the mask head of type `autoencoder` (`modeling/heads/mask_autoencoder.py`) decodes
what it makes of an anchor's state. Parameter names are the published ones. A directory has `mask_autoencoder.safetensors` and
`mask_autoencoder.json`.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from modeling.norms import ChannelNorm, FixedBatchNorm

WEIGHTS_NAME, CONFIG_NAME = "mask_autoencoder.safetensors", "mask_autoencoder.json"
DOWNSAMPLE = 32
Norm = Literal["layer", "batch"]
NORMS: Mapping[str, type[nn.Module]] = {"layer": ChannelNorm, "batch": FixedBatchNorm}


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskAutoencoderConfig:
    """Size of a mask autoencoder; the defaults are the published one's.

    Attributes:
        resolution: side of the masks in pixels, a multiple of 32.
        width: channels inside the encoder's blocks; a multiple of 4. The code is made of a map of twice as many.
        down, up: blocks of the encoder's and the decoder's four stages.
        code: length of the code.
        norm: of blocks that keep their size: `layer`, as in the others, or `batch`, as published.

    Raises:
        ValueError: if a number cannot be used.
    """

    resolution: int = 256
    width: int = 32
    down: tuple[int, ...] = (3, 4, 6, 3)
    up: tuple[int, ...] = (1, 2, 6, 4)
    code: int = 4096
    norm: Norm = "layer"

    def __post_init__(self) -> None:
        counts = {"resolution": self.resolution, "width": self.width, "code": self.code}
        counts |= {f"{n}[{i}]": v for n in ("down", "up") for i, v in enumerate(getattr(self, n))}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"mask autoencoder: {name} is {value!r}; it must be a positive whole number")
        if self.resolution % DOWNSAMPLE:
            raise ValueError(
                f"mask autoencoder: resolution {self.resolution} is not a multiple of {DOWNSAMPLE}"
            )
        if self.width % 4:
            raise ValueError(f"mask autoencoder: width {self.width} is not a multiple of 4")
        if len(self.down) != 4 or len(self.up) != 4:
            raise ValueError("mask autoencoder: down and up are four numbers of blocks each")
        if self.norm not in NORMS:
            raise ValueError(f"mask autoencoder: norm is {self.norm!r}; it must be {' or '.join(NORMS)}")

    @property
    def side(self) -> int:
        """Of the map that the code is made of."""
        return self.resolution // DOWNSAMPLE

    @staticmethod
    def from_json(values: Mapping[str, Any], where: str) -> "MaskAutoencoderConfig":
        """The config that a JSON object describes.

        Raises:
            ValueError: naming `where` and the key that is unknown or unusable.
        """
        known = [f.name for f in fields(MaskAutoencoderConfig)]
        for key in values:
            if key not in known:
                near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{where}: unknown key {key!r}; did you mean {near!r}?")
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        try:
            return MaskAutoencoderConfig(**kept)
        except ValueError as e:
            raise ValueError(f"{where}: {e}") from e


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolution without biases beside the input itself, or beside a 1x1 of it where size or width change.

    Args:
        before, inner, after: channels.
        stride: of the 3x3; it makes the map smaller, or larger with `up`.
        up: transposed convolutions.
        norm: of a block that changes nothing of the shape; the others have layer norm.
        inner_norm: of the three convolutions, whatever the shape; the shortcut is then as it would be.
    """

    def __init__(
        self,
        before: int,
        inner: int,
        after: int,
        stride: int = 1,
        *,
        up: bool = False,
        norm: Norm = "layer",
        inner_norm: Norm | None = None,
    ):
        super().__init__()
        changes = stride > 1 or before != after
        beside_norm = ChannelNorm if changes else NORMS[norm]
        make = beside_norm if inner_norm is None else NORMS[inner_norm]
        self.conv1, self.norm1 = nn.Conv2d(before, inner, 1, bias=False), make(inner)
        self.conv2: nn.Module = nn.Conv2d(inner, inner, 3, stride=stride, padding=1, bias=False)
        if up and stride > 1:
            self.conv2 = nn.ConvTranspose2d(inner, inner, 3, stride, padding=1, output_padding=1, bias=False)
        self.norm2 = make(inner)
        self.conv3, self.norm3 = nn.Conv2d(inner, after, 1, bias=False), make(after)
        self.shortcut = ""
        if changes:
            beside: nn.Module = nn.Conv2d(before, after, 1, stride=stride, bias=False)
            if up:
                beside = nn.ConvTranspose2d(before, after, 1, stride, output_padding=stride - 1, bias=False)
            self.shortcut = "upsample" if up else "downsample"
            self.add_module(self.shortcut, nn.Sequential(beside, beside_norm(after)))

    def forward(self, x: Tensor) -> Tensor:
        """`i before h w` -> `i after h' w'`."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        y = F.relu(self.norm3(self.conv3(y)))
        beside = self.get_submodule(self.shortcut)(x) if self.shortcut else x
        return F.relu(y + beside)


class MaskAutoencoder(nn.Module):
    """`encode` a mask, `decode` a code."""

    def __init__(self, config: MaskAutoencoderConfig):
        super().__init__()
        self.config = config
        width, norm = config.width, config.norm
        wide = 2 * width
        self.conv1 = nn.Conv2d(1, width, 7, stride=2, padding=3, bias=False)
        self.norm1 = ChannelNorm(width)
        for stage, count in enumerate(config.down, start=1):
            first = Bottleneck(width if stage == 1 else wide, width, wide, 1 if stage == 1 else 2)
            rest = (Bottleneck(wide, width, wide, norm=norm) for _ in range(count - 1))
            self.add_module(f"dlayer{stage}", nn.Sequential(first, *rest))
        flat = wide * config.side**2
        self.linear_enc, self.linear_dec = nn.Linear(flat, config.code), nn.Linear(config.code, flat)
        before = wide
        for stage, count in enumerate(config.up, start=1):
            after = (16 * width) >> stage
            same = (Bottleneck(before, before // 4, before, up=True, norm=norm) for _ in range(count - 1))
            self.add_module(
                f"uplayer{stage}", nn.Sequential(*same, Bottleneck(before, after // 2, after, 2, up=True))
            )
            before = after
        # Published: batch norm inside although the shape changes.
        self.uplayer_top = Bottleneck(before, width // 2, width // 2, 2, up=True, inner_norm=norm)
        self.conv1_1 = nn.ConvTranspose2d(width // 2, 1, 1, bias=False)

    def encode(self, masks: Tensor) -> Tensor:
        """`i resolution resolution`, 0 to 1 -> `i code`."""
        x = F.relu(self.norm1(self.conv1(masks[:, None].to(self.conv1.weight.dtype))))
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        for stage in range(1, 5):
            x = self.get_submodule(f"dlayer{stage}")(x)
        return self.linear_enc(x.flatten(1))

    def decode(self, code: Tensor) -> Tensor:
        """`i code` -> logits `i resolution resolution`."""
        side = self.config.side
        x = F.relu(self.linear_dec(code)).unflatten(1, (-1, side, side))
        for stage in range(1, 5):
            x = self.get_submodule(f"uplayer{stage}")(x)
        return self.conv1_1(self.uplayer_top(x))[:, 0]

    def keep_encoder(self) -> None:
        """Switch off the gradients of `encode`: in a head it only says what a true mask's code is."""
        for name, p in self.named_parameters():
            if name.startswith(("conv1.", "norm1.", "dlayer", "linear_enc.")):
                p.requires_grad_(False)


def save_mask_autoencoder(model: MaskAutoencoder, folder: Path) -> None:
    """Write both files."""
    state = {name: x.detach().cpu().contiguous() for name, x in model.state_dict().items()}
    save_file(state, folder / WEIGHTS_NAME)
    text = json.dumps(asdict(model.config), indent=2) + "\n"
    (folder / CONFIG_NAME).write_text(text, encoding="utf-8")


def read_mask_autoencoder_config(folder: Path) -> dict[str, Any]:
    """The keys of a directory's config.

    Raises:
        ValueError: if it is not there or no JSON object.
    """
    file = folder / CONFIG_NAME
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ValueError(
            f"{file}: cannot be read ({e}); train a mask autoencoder with train/main_mask_autoencoder.py"
        ) from e
