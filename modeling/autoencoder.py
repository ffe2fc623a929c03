"""The image autoencoder: pixels in [-1, 1] to scaled latents and back, in the layout of the FLUX autoencoder.

In: `b 3 hh ww` pixels, or a model directory with `ae.safetensors` (and `ae_config.json`; absent = the published size), or a
diffusers `AutoencoderKL` directory.
Out: `b z h w` latents of about unit variance, each side divided by `AutoEncoderConfig.downsample`; from latents, pixels.
Parameter names are those of the published file. It is trained by `train/main_autoencoder.py` and frozen everywhere else.

Letters here: `b` images, `c` channels, `hh ww` pixels, `z h w` latents.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from modeling.diffusers_autoencoder import WEIGHTS_NAME as DIFFUSERS_WEIGHTS
from modeling.diffusers_autoencoder import from_diffusers, read_diffusers_config
from modeling.weights import unreadable

logger = logging.getLogger(__name__)

WEIGHTS_NAMES = ("ae.safetensors", "vae_model.safetensors")
"""Where the weights are looked for, in this order."""
CONFIG_NAME = "ae_config.json"

_FREE_KEYS = ("num_groups", "resolution", "downsample")
"""Keys a config file may leave out: they have one published value, or follow from the others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoEncoderConfig:
    """Size and scaling of an autoencoder; the defaults are the published FLUX values.

    Attributes:
        in_channels: colours going in.
        out_ch: colours coming out.
        ch: width at full resolution.
        ch_mult: width of each level as a multiple of `ch`; every level after the first halves both sides.
        num_res_blocks: residual blocks per encoder level; the decoder has one more.
        z_channels: latent channels.
        num_groups: groups of every GroupNorm; divides every width.
        scale_factor: latents are `scale_factor * (z - shift_factor)`.
        shift_factor: see `scale_factor`.
        resolution: side of the training images; the weights do not depend on it.

    Raises:
        ValueError: if a number cannot be used.
    """

    in_channels: int = 3
    out_ch: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    num_groups: int = 32
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159
    resolution: int = 256

    def __post_init__(self) -> None:
        counts = {f.name: getattr(self, f.name) for f in fields(self) if f.type is int}
        counts |= {f"ch_mult[{i}]": m for i, m in enumerate(self.ch_mult)}
        for name, value in counts.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"autoencoder {name} is {value!r}; it must be a whole number of at least 1")
        if not self.ch_mult:
            raise ValueError("autoencoder ch_mult is empty; it needs one number per level, e.g. [1, 2, 4, 4]")
        for width in self.widths:
            if width % self.num_groups:
                raise ValueError(
                    f"autoencoder num_groups {self.num_groups} does not divide the width {width} "
                    f"(ch {self.ch} x ch_mult {list(self.ch_mult)}); choose num_groups that divides ch"
                )
        for name in ("scale_factor", "shift_factor"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
                raise ValueError(f"autoencoder {name} is {value!r}; it must be a finite number")
        if self.scale_factor <= 0:
            raise ValueError(f"autoencoder scale_factor is {self.scale_factor}; it must be above 0")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each level, full resolution first."""
        return tuple(self.ch * m for m in self.ch_mult)

    @property
    def downsample(self) -> int:
        """Pixels per latent position, along one side."""
        return 2 ** (len(self.ch_mult) - 1)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ch_mult": list(self.ch_mult), "downsample": self.downsample}

    @staticmethod
    def from_json(state: Mapping[str, Any], where: str = CONFIG_NAME) -> "AutoEncoderConfig":
        """The config a JSON object describes.

        Args:
            state: every field, but those of `_FREE_KEYS` may be absent; `downsample` may be given and must then fit `ch_mult`.
            where: the file, for messages.

        Raises:
            ValueError: naming the file and the key that is unknown, missing or unusable.
        """
        known = [*(f.name for f in fields(AutoEncoderConfig)), "downsample"]
        for key in state:
            if key not in known:
                near = get_close_matches(key, known, n=1, cutoff=0.0)[0]
                raise ValueError(f"{where}: unknown key {key!r}; the nearest valid key is {near!r}")
        missing = [key for key in known if key not in state and key not in _FREE_KEYS]
        if missing:
            raise ValueError(f"{where}: missing {', '.join(missing)}")
        values = {key: value for key, value in state.items() if key != "downsample"}
        if not isinstance(values["ch_mult"], list | tuple):
            raise ValueError(f"{where}: ch_mult is {values['ch_mult']!r}; it must be a list of whole numbers")
        try:
            config = AutoEncoderConfig(**{**values, "ch_mult": tuple(values["ch_mult"])})
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if state.get("downsample", config.downsample) != config.downsample:
            raise ValueError(
                f"{where}: downsample is {state['downsample']}, but {len(config.ch_mult)} levels in ch_mult "
                f"divide each side by {config.downsample}"
            )
        return config


class AutoEncoder(nn.Module):
    """KL autoencoder: `encode` gives scaled latents, `decode` takes them."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode_moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior of images, not yet scaled.

        Args:
            pixels: `b 3 hh ww` float in [-1, 1], each side at least `downsample`; what exceeds a multiple of it is cut off.

        Returns:
            Mean and log variance, `b z h w` each.

        Raises:
            ValueError: if the shape is not that of images, or an image is smaller than one latent position.
        """
        side = self.config.downsample
        if pixels.ndim != 4 or pixels.shape[1] != self.config.in_channels or min(pixels.shape[2:]) < side:
            raise ValueError(
                f"images to encode are {tuple(pixels.shape)}; "
                f"expected (images, {self.config.in_channels}, height, width) with sides of at least {side}"
            )
        mean, logvar = self.encoder(pixels).chunk(2, dim=1)
        return mean, logvar

    def encode(self, pixels: Tensor, noise: Tensor | None = None) -> Tensor:
        """Scaled latents `b z h w` of images `b 3 hh ww` in [-1, 1].

        Args:
            pixels: see `encode_moments`.
            noise: `b z h w` standard normal, to sample the posterior; None takes its mean.

        Raises:
            ValueError: if the images or the noise have another shape.
        """
        z, logvar = self.encode_moments(pixels)
        if noise is not None:
            if noise.shape != z.shape:
                raise ValueError(f"noise is {tuple(noise.shape)}, the latents are {tuple(z.shape)}")
            z = z + torch.exp(0.5 * logvar) * noise
        return self.scaled(z)

    def scaled(self, z: Tensor) -> Tensor:
        """Posterior samples or means, any shape, brought to about unit variance."""
        return self.config.scale_factor * (z - self.config.shift_factor)

    def decode(self, latents: Tensor) -> Tensor:
        """Images `b 3 hh ww`, about in [-1, 1] and not clamped, of scaled latents `b z h w`.

        Raises:
            ValueError: if the shape is not that of latents.
        """
        if latents.ndim != 4 or latents.shape[1] != self.config.z_channels:
            raise ValueError(
                f"latents to decode are {tuple(latents.shape)}; expected (images, {self.config.z_channels}, height, width)"
            )
        return self.decoder(latents / self.config.scale_factor + self.config.shift_factor)


class Encoder(nn.Module):
    """`b 3 hh ww` -> `b 2z h w`, mean and log variance stacked."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths, groups = config.widths, config.num_groups
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config, is_last=i + 1 == len(widths))
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """`b z h w` -> `b 3 hh ww`. `up` is numbered like the encoder's `down`, so it runs from the last level to the first."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths, groups = config.widths, config.num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, len(widths) - 1)], width, config, is_last=i == 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(widths[0], groups)
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class DownLevel(nn.Module):
    """The encoder's blocks of one width, then half the sides unless it is the last level."""

    def __init__(self, width_in: int, width: int, config: AutoEncoderConfig, *, is_last: bool):
        super().__init__()
        self.block = _blocks(config.num_res_blocks, width_in, width, config.num_groups)
        self.downsample = nn.Identity() if is_last else Downsample(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.downsample(self.block(x))


class UpLevel(nn.Module):
    """The decoder's blocks of one width, then twice the sides unless it is the last level."""

    def __init__(self, width_in: int, width: int, config: AutoEncoderConfig, *, is_last: bool):
        super().__init__()
        self.block = _blocks(config.num_res_blocks + 1, width_in, width, config.num_groups)
        self.upsample = nn.Identity() if is_last else Upsample(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.upsample(self.block(x))


class Middle(nn.Module):
    """Residual block, attention over all positions, residual block, at the lowest resolution."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(width, width, groups)
        self.attn_1 = AttnBlock(width, groups)
        self.block_2 = ResnetBlock(width, width, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions, each after norm and swish, around a shortcut (1x1 where the width changes)."""

    def __init__(self, width_in: int, width: int, groups: int):
        super().__init__()
        self.norm1 = _norm(width_in, groups)
        self.conv1 = nn.Conv2d(width_in, width, 3, padding=1)
        self.norm2 = _norm(width, groups)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.nin_shortcut = nn.Identity() if width_in == width else nn.Conv2d(width_in, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """One head of attention as wide as the features; the projections are 1x1 convolutions, as in the published weights."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = _norm(width, groups)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        q, k, v = (rearrange(proj(y), "b c h w -> b 1 (h w) c") for proj in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(y, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    """Halves both sides; the padding is at the right and the bottom only."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Repeats every position 2x2, then a 3x3 convolution."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def _blocks(count: int, width_in: int, width: int, groups: int) -> nn.Sequential:
    return nn.Sequential(*(ResnetBlock(width_in if i == 0 else width, width, groups) for i in range(count)))


def _norm(width: int, groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(groups, width, eps=1e-6)


def load_autoencoder(path: str | Path, device: torch.device | str = "cpu") -> AutoEncoder:
    """The frozen autoencoder of a model directory, in float32 and eval mode.

    Args:
        path: a directory with `ae.safetensors` or `vae_model.safetensors` (names may begin with `module.`), and `ae_config.json`
            unless the autoencoder has the published size; such a weights file itself; or a diffusers `AutoencoderKL` directory.
        device: where to put it.

    Raises:
        ValueError: if a file is missing or unreadable, or if names or shapes do not fit; all of them are listed.
    """
    config, file = read_config(path), find_autoencoder(path)
    try:
        loaded = load_file(str(file))
    except (SafetensorError, OSError) as error:
        raise unreadable(file, error) from error
    state = {name.removeprefix("module."): tensor.float() for name, tensor in loaded.items()}
    if file.name == DIFFUSERS_WEIGHTS:
        state = from_diffusers(state, len(config.ch_mult))
    with torch.device("meta"):
        model = AutoEncoder(config)
    _require_same_keys(state, model.state_dict(), file)
    model.load_state_dict(state, assign=True)
    logger.info("%s: autoencoder: %d of %d tensors loaded", file, len(state), len(state))
    return model.to(device).eval().requires_grad_(False)


def find_autoencoder(path: str | Path) -> Path:
    """The file that holds an autoencoder's weights; `path` as in `load_autoencoder`.

    Raises:
        ValueError: if there is none.
    """
    place = Path(path)
    if place.is_file():
        return place
    names = (*WEIGHTS_NAMES, DIFFUSERS_WEIGHTS)
    file = next((place / name for name in names if (place / name).is_file()), None)
    if file is None:
        raise ValueError(
            f"{place}: no {' or '.join(WEIGHTS_NAMES)} here; copy the published file, or train one: train/main_autoencoder.py"
        )
    return file


def read_config(path: str | Path) -> AutoEncoderConfig:
    """The size of an autoencoder: of `ae_config.json`, or of a diffusers `config.json`; the published values if there is neither.

    Args:
        path: as in `load_autoencoder`.

    Raises:
        ValueError: if the file is not JSON or not a usable config.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    holds = [name for name in (*WEIGHTS_NAMES, DIFFUSERS_WEIGHTS) if (folder / name).is_file()]
    if DIFFUSERS_WEIGHTS in (Path(path).name, *holds[:1]):
        return AutoEncoderConfig.from_json(read_diffusers_config(folder), where=str(folder / "config.json"))
    file = folder / CONFIG_NAME
    if not file.is_file():
        return AutoEncoderConfig()
    try:
        state = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from error
    if not isinstance(state, dict):
        raise ValueError(f"{file}: expected a JSON object with the keys of AutoEncoderConfig")
    return AutoEncoderConfig.from_json(state, where=str(file))


def save_autoencoder(model: AutoEncoder, model_dir: str | Path) -> None:
    """Write `ae.safetensors` and `ae_config.json`, each replaced in one step."""
    folder = Path(model_dir)
    weights, config = folder / WEIGHTS_NAMES[0], folder / CONFIG_NAME
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, f"{weights}.tmp")
    os.replace(f"{weights}.tmp", weights)
    Path(f"{config}.tmp").write_text(json.dumps(model.config.to_json(), indent=2) + "\n", encoding="utf-8")
    os.replace(f"{config}.tmp", config)


def _require_same_keys(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], file: Path) -> None:
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "wrong shape": [
            f"{name} {list(found[name].shape)} instead of {list(wanted[name].shape)}"
            for name in wanted
            if name in found and found[name].shape != wanted[name].shape
        ],
    }
    lines = [f"  {what} ({len(names)}): {', '.join(names)}" for what, names in wrong.items() if names]
    if lines:
        config = file.parent / (CONFIG_NAME if file.name != DIFFUSERS_WEIGHTS else "config.json")
        source = config if config.is_file() else f"the published values ({config} does not exist)"
        raise ValueError("\n".join([f"{file}: the weights do not fit the autoencoder of {source}", *lines]))
