"""Mask of what an anchor means, by SAM's mask decoder: the anchor's state is the prompt (LISA, arXiv 2308.00692).

    "heads": {"mask": {"type": "sam", "vision_sharing": "vlm"}}

`vision_sharing` says what the decoder looks at. `vlm`: the tower's grid, at its own size and aspect, through a trained neck;
edges, which the tower has smoothed away, come straight from the pixels as SAM 2's finer maps do. `sam`: the same, where the tower
is SAM's encoder, whose neck is then SAM's. `separate`: SAM's own encoder on `FeatureGrids.views`, padded to its square.
`--mask_path` takes the values of a Hugging Face SAM directory.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.heads.grids import regions_by_size
from modeling.heads.head import PerceptionHead
from modeling.heads.masks import MaskOutput, laid_out, stretched, unpadded
from modeling.norms import ChannelNorm
from modeling.ops.patch import normalise_pixels
from modeling.sam.config import SamDecoderConfig, SamVisionConfig
from modeling.sam.decoder import SamMaskDecoder, first_mask, stable_mask
from modeling.sam.encoder import SamNeck, SamVisionEncoder, padded
from modeling.sam.prompts import SamPositionalEmbedding, SamPromptEncoder
from modeling.sam.published import sam_options, sam_weights
from modeling.types import FeatureGrids, HeadInputs
from modeling.weights import Weights

VisionSharing = Literal["vlm", "sam", "separate"]


_Size = tuple[tuple[int, int] | None, tuple[int, int]]


class _Pictures(NamedTuple):
    """Regions about pictures that are decoded together.

    Attributes:
        at: places of the regions, `k`.
        which: which picture each is about, `k`.
        grid: `i d h w`, what the decoder looks at.
        fine: finer maps, or None.
        sizes: per picture, (height, width) of what of the square is picture, None without a square; and its full size.
    """

    at: Tensor
    which: Tensor
    grid: Tensor
    fine: tuple[Tensor, Tensor] | None
    sizes: list[_Size]


class SamMaskHead(PerceptionHead):
    """State of an anchor -> Linear, ReLU, Linear -> a prompt token -> SAM's mask decoder -> mask, and how good it thinks it is.

    Args:
        hidden_size, grid_size, patch_size: of the model.
        vision_sharing: `vlm`, `sam` or `separate`.
        decoder: keys of `SamDecoderConfig`.
        encoder: keys of `SamVisionConfig`, of `separate`.
        fine_channels: width of the look at the pixels beside a shared grid; 0: none, as in SAM.
        mask_channels: inner width of the prompt encoder's way for rough masks (in the published files; unused here).
        stability: at inference, SAM 2's rule: another mask where the first is unstable.

    Raises:
        ValueError: naming the option that cannot be used.
    """

    predicts = "mask"
    gives = ("iou",)

    def __init__(
        self,
        *,
        hidden_size: int,
        grid_size: int,
        patch_size: int,
        vision_sharing: VisionSharing = "vlm",
        decoder: Mapping[str, Any] | None = None,
        encoder: Mapping[str, Any] | None = None,
        fine_channels: int = 32,
        mask_channels: int = 16,
        stability: bool = False,
    ):
        super().__init__()
        where = "bagel_config.json: heads.mask"
        if vision_sharing not in get_args(VisionSharing):
            raise ValueError(
                f"{where}: vision_sharing is {vision_sharing!r}; it must be {', '.join(get_args(VisionSharing))}"
            )
        if encoder and vision_sharing != "separate":
            raise ValueError(
                f"{where}: encoder is for vision_sharing separate; {vision_sharing} looks at the tower's grid"
            )
        config = SamDecoderConfig.from_json(decoder or {}, f"{where}.decoder", strict=True)
        vision = SamVisionConfig.from_json(encoder or {}, f"{where}.encoder", strict=True)
        width, self.patch_size, self.stability = config.hidden_size, patch_size, stability
        self.separate = vision_sharing == "separate"
        self.projection = nn.Sequential(
            nn.Linear(hidden_size, hidden_size), nn.ReLU(), nn.Linear(hidden_size, width)
        )
        self.mask_decoder = SamMaskDecoder(config)
        self.prompt_encoder = SamPromptEncoder(width, vision.image_size, mask_channels)
        self.shared_image_embedding = SamPositionalEmbedding(width)
        if self.separate:
            if vision.output_channels != width:
                raise ValueError(
                    f"{where}: encoder.output_channels {vision.output_channels} is not decoder.hidden_size {width}"
                )
            self.vision_encoder = SamVisionEncoder(vision)
        else:
            self.neck = SamNeck(grid_size, width)
        self.fine = FineMaps(width, fine_channels) if fine_channels and not self.separate else None
        self._keep_unused()

    def _keep_unused(self) -> None:
        """What only clicks, boxes and several masks a prompt need is kept as it is, for whoever takes the decoder elsewhere."""
        for name, p in self.prompt_encoder.named_parameters():
            p.requires_grad_(name == "no_mask_embed.weight")
        for mlp in self.mask_decoder.output_hypernetworks_mlps[1:]:
            mlp.requires_grad_(False)
        if self.mask_decoder.config.object_score:
            self.mask_decoder.pred_obj_score_head.requires_grad_(False)

    @classmethod
    def wants_view(cls, options: Mapping[str, Any]) -> bool:
        return options.get("vision_sharing") == "separate"

    @classmethod
    def require_tower(cls, options: Mapping[str, Any], tower: object) -> None:
        is_sam, wants = isinstance(tower, SamVisionConfig), options.get("vision_sharing", "vlm")
        if (wants == "sam" and not is_sam) or (wants == "vlm" and is_sam):
            which = "is SAM's: say sam, or separate" if is_sam else "is not SAM's: say vlm, or separate"
            raise ValueError(
                f"bagel_config.json: heads.mask: vision_sharing is {wants!r}, and the vision tower (vit_config.json) {which}"
            )

    @classmethod
    def options_from(cls, path: Path, options: Mapping[str, Any]) -> dict[str, Any]:
        found = sam_options(path, separate=cls.wants_view(options))
        parts: list[str] = [key for key in ("decoder", "encoder") if key in found]
        nested = {key: {**found[key], **options.get(key, {})} for key in parts}
        return {"mask_channels": found["mask_channels"], **options, **nested}

    @classmethod
    def weights_from(cls, path: Path, options: Mapping[str, Any]) -> tuple[Weights, tuple[str, ...]]:
        store, own = sam_weights(path), ["projection.", "fine."]
        sharing = options.get("vision_sharing", "vlm")
        if sharing == "vlm":
            own.append("neck.")
        if sharing == "sam":  # the tower is the encoder; its neck is the head's
            neck = "vision_encoder.neck."
            store = store.renamed(
                {key.replace(neck, "neck."): key for key in store.shapes if key.startswith(neck)}
            )
        if SamDecoderConfig.from_json(options.get("decoder", {}), "").object_score:
            own.append("prompt_encoder.")  # clicks and rough masks are others in SAM 2
        return store, tuple(own)

    def forward(self, inputs: HeadInputs) -> MaskOutput:
        """Predict one mask per anchor at the transformed picture's size.

        Raises:
            ValueError: if a picture has no view for the encoder.
        """
        prompts = self.projection(inputs.hidden)
        look = self._own_grids if self.separate else self._shared_grids
        masks: list[tuple[int, Tensor]] = []
        places, ious = [], []
        nothing = prompts[:0]
        for pictures in look(inputs.grids, inputs.regions.image):
            logits, iou = self.decode(pictures.grid, pictures.which, prompts[pictures.at], pictures.fine)
            for row, (at, which) in enumerate(
                zip(pictures.at.tolist(), pictures.which.tolist(), strict=True)
            ):
                masks.append((at, self._full(logits[row : row + 1], *pictures.sizes[which])))
            places.append(pictures.at)
            ious.append(iou)
            nothing = logits[:0]
        order = torch.cat(places).argsort()
        flat, hw = laid_out(masks, nothing.float())
        return MaskOutput(
            boxes=inputs.hidden.new_zeros(0, 4), mask_logits=flat, mask_hw=hw, iou=torch.cat(ious)[order]
        )

    def decode(
        self, grid: Tensor, which: Tensor, prompts: Tensor, fine: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Masks at four times the grid's size.

        Args:
            grid: `i d h w`.
            which: `k` int64, whose picture each prompt is about.
            prompts: `k d`.
            fine: see `SamMaskDecoder`.

        Returns:
            logits `k 4h 4w`, quality `k`.
        """
        found = self.mask_decoder(
            grid[which],
            self.shared_image_embedding.grid(*grid.shape[2:]).to(grid.dtype),
            prompts[:, None],
            self.prompt_encoder.dense(),
            None if fine is None else (fine[0][which], fine[1][which]),
        )
        choose = stable_mask if self.stability and not self.training else first_mask
        return choose(found)

    def _shared_grids(self, grids: FeatureGrids, image: Tensor) -> Iterator[_Pictures]:
        for at, features, pixels, which in regions_by_size(grids, image):
            h, w = features.shape[1:3]
            fine = None if self.fine is None else self.fine(pixels, (h, w))
            size = (h * self.patch_size, w * self.patch_size)
            yield _Pictures(at, which, self.neck(features), fine, [(None, size)] * len(features))

    def _own_grids(self, grids: FeatureGrids, image: Tensor) -> Iterator[_Pictures]:
        encoder, wanted = self.vision_encoder, image.tolist()
        images = sorted(set(wanted))
        views = tuple(grids.views[i] for i in images)
        if any(not view.numel() for view in views):
            raise ValueError(
                "a picture with a mask has no view for the mask head's own encoder; give its group head_image_transform_args "
                f"{{type: sam, image_size: {encoder.config.image_size}}}"
            )
        weight = encoder.patch_embed.projection.weight
        pixels = padded(views, encoder.config.image_size, weight.device).to(weight.dtype)
        assert encoder.neck is not None
        # One at a time: attention over all cells of one picture is what fills memory.
        grid = torch.cat([encoder.neck(encoder(one)) for one in pixels.split(1)])
        sizes: list[_Size] = []
        for view, (rows, columns) in zip(views, (grids.hw[i] for i in images), strict=True):
            full = (rows * self.patch_size, columns * self.patch_size)
            sizes.append(((view.shape[1], view.shape[2]), full))
        which = torch.tensor([images.index(i) for i in wanted], dtype=torch.int64, device=image.device)
        yield _Pictures(torch.arange(len(image), device=image.device), which, grid, None, sizes)

    def _full(self, logits: Tensor, view_hw: tuple[int, int] | None, hw: tuple[int, int]) -> Tensor:
        """`1 4h 4w` -> `hh ww` float32."""
        if view_hw is None:
            return stretched(logits, hw)[0]
        return unpadded(logits, self.vision_encoder.config.image_size, view_hw, hw)[0]


class FineMaps(nn.Module):
    """Maps of a picture at twice and at four times its grid, straight from the pixels: where edges are."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.look = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.norm = ChannelNorm(channels)
        self.coarse = nn.Conv2d(channels, width // 4, 3, padding=1)
        self.finest = nn.Conv2d(channels, width // 8, 3, padding=1)

    def forward(self, pixels: Tensor, hw: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """`i 3 hh ww` uint8, grid `h w` -> `i d/4 2h 2w`, `i d/8 4h 4w`."""
        x = normalise_pixels(pixels).to(self.look.weight.dtype)
        x = F.gelu(self.norm(self.look(x)))
        size = (4 * hw[0], 4 * hw[1])
        if tuple(x.shape[2:]) != size:
            x = F.interpolate(x, size=size, mode="bilinear", antialias=True)
        return self.coarse(F.avg_pool2d(x, 2)), self.finest(x)
