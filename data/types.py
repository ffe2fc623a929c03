"""The types that carry data, in the order it flows: Segment -> Sample -> PackedBatch, with the Cursor beside them.

A `Sample` is one training example: a row of `Segment`s (text and images) and the `Region`s anchored in its text. Several samples
laid end to end in one sequence are a `PackedBatch`. Imports torch only.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Kind = Literal["text", "und_image", "cond_image", "gen_image"]
"""`und_image` goes to the ViT, `cond_image` to the VAE without noise, `gen_image` to the VAE with noise: the target."""

Mode = Literal["causal", "full", "noise"]
"""How a split attends: `causal` to what precedes each token, `full` and `noise` to all of itself; nobody else sees `noise`."""

Role = Literal["", "teacher", "student"]
"""Whose answer a supervised text is, where a sample has demonstrations; their losses are reported apart."""
ROLES: tuple[Role, ...] = ("", "teacher", "student")

EMPTY_IDS = torch.zeros(0, dtype=torch.int64)
EMPTY_PIXELS = torch.zeros(3, 0, 0, dtype=torch.uint8)
EMPTY_MASK = torch.zeros(0, 0, dtype=torch.uint8)
NO_BOXES = torch.zeros(0, 4)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One span of a sample: a text or an image in one role.

    Attributes:
        kind: what it is and where it goes.
        ids: `t` int64, token ids of a text without the tokens around it; empty for images.
        pixels: `3 hh ww` uint8, an image after its transform; empty for text.
        view: `3 hh ww` uint8, an `und_image` as an image encoder inside a head wants it; empty if no head asked.
        supervised: a text whose tokens are predicted.
        role: whose answer it is, see `Role`.
        droppable: may be left out by condition dropout.
        dropped: was left out; images then leave a gap of one rotary position.
        bare: a text without its begin and end tokens (one decoded token at inference).
        branch: 0 for the sample's trunk. Segments of one branch k > 0 see the trunk before them and each other; nobody outside
            the branch sees them, and rotary positions start where the trunk's stood. So several questions about one picture share
            its tokens without seeing each other's answers: each trains as if asked alone.
        end_label: what the closing token has to predict besides (the next modality, say `<|vision_start|>`); None: nothing.
        frame_delta: of an image that is a frame of a video: what the rotary positions grow by until the next frame. A target's
            frames are then seen by what follows them, as published.
        same_split: a further frame of the video that the segment before it belongs to: they see each other, and share a timestep.
        timestep: of a `gen_image`, in (0, 1], after the schedule's shift; 0 for everything else.
        noise_seed: of images that pass the VAE; seeds the posterior sample and the flow noise.
    """

    kind: Kind
    ids: Tensor = EMPTY_IDS
    pixels: Tensor = EMPTY_PIXELS
    view: Tensor = EMPTY_PIXELS
    supervised: bool = False
    role: Role = ""
    droppable: bool = False
    dropped: bool = False
    bare: bool = False
    branch: int = 0
    end_label: int | None = None
    frame_delta: int | None = None
    same_split: bool = False
    timestep: float = 0.0
    noise_seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Region:
    """A box and/or a mask of one understanding image, anchored to one text token.

    Attributes:
        head: the perception head that reads the anchor (`box`, `mask`, …).
        segment: place in the sample's segments of the text that holds the anchor, or of the picture itself, for a head that looks
            for things without being told by a token.
        token: place of the anchor in that text's `ids`; of a picture, whose closing token is the anchor, 0.
        image: place of the `und_image` in the sample's segments.
        boxes: `k 4` xyxy in [0, 1] of the transformed image: one for a head that says where one thing is, any number for a
            detector, none beside a mask.
        phrases: token ids of what each box holds, for heads that say so; empty if this one does not.
        mask: `hh ww` uint8 0/1 of the transformed image; empty if there is none.
        name: what it is, for people ("the red 7").
    """

    head: str
    segment: int
    token: int
    image: int
    boxes: Tensor = NO_BOXES
    phrases: tuple[Tensor, ...] = ()
    mask: Tensor = EMPTY_MASK
    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a sample came from: enough to make it again."""

    group: str
    lane: int
    position: int
    """Place in the group's endless order (epoch x length + place in the epoch's permutation)."""
    where: str
    """File and line or member, for people."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One training example, before packing."""

    segments: tuple[Segment, ...]
    regions: tuple[Region, ...] = ()
    origin: Origin = Origin(group="", lane=0, position=0, where="")
    task: str = ""


@dataclass(frozen=True, slots=True)
class Amount:
    """So much data: samples, the tokens they take in packs, and the predictions among these that a loss is made of."""

    samples: int = 0
    tokens: int = 0
    loss_tokens: int = 0

    def __add__(self, other: "Amount") -> "Amount":
        return Amount(
            self.samples + other.samples,
            self.tokens + other.tokens,
            self.loss_tokens + other.loss_tokens,
        )

    def __sub__(self, other: "Amount") -> "Amount":
        return Amount(
            self.samples - other.samples,
            self.tokens - other.tokens,
            self.loss_tokens - other.loss_tokens,
        )

    def to_json(self) -> list[int]:
        return [self.samples, self.tokens, self.loss_tokens]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reject:
    """A record that could not be used: `reason` is a short key to count by, `message` says it to a person."""

    group: str
    position: int
    where: str
    reason: str
    message: str
    amount: Amount = Amount(samples=1)
    """Tokens only where it came to counting them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RegionBatch:
    """The regions of a pack that one perception head reads.

    Attributes:
        anchor: `r` int64, place of the anchor token in the packed sequence.
        image: `r` int64, which understanding image of the pack.
        boxes: `b 4` xyxy in [0, 1], region after region.
        num_boxes: `r` int64, how many of them each region has.
        phrase_ids: `q` int64, what the boxes hold, one phrase after the other.
        phrase_lens: `b` int64, tokens of each (0 where nothing is said).
        mask_values: `p` uint8, the masks' pixels one after the other, row by row.
        mask_hw: `r 2` int64, height and width of each mask (0 0 if none).
    """

    anchor: Tensor
    image: Tensor
    boxes: Tensor
    num_boxes: Tensor
    phrase_ids: Tensor
    phrase_lens: Tensor
    mask_values: Tensor
    mask_hw: Tensor

    @staticmethod
    def unknown(anchor: Tensor, image: Tensor) -> "RegionBatch":
        """Regions of which nothing is known but where they are read: those of inference; `r` may be 0."""
        none = torch.zeros_like(anchor)
        return RegionBatch(
            anchor=anchor,
            image=image,
            boxes=NO_BOXES.to(anchor.device),
            num_boxes=none,
            phrase_ids=none[:0],
            phrase_lens=none[:0],
            mask_values=none[:0].to(torch.uint8),
            mask_hw=torch.stack([none, none], dim=1),
        )

    @property
    def box_region(self) -> Tensor:
        """`b` int64, whose box each is."""
        return torch.repeat_interleave(
            torch.arange(len(self.anchor), device=self.anchor.device), self.num_boxes
        )

    def map(self, fn: Callable[[Tensor], Tensor]) -> "RegionBatch":
        return replace(self, **{f.name: fn(getattr(self, f.name)) for f in fields(self)})


class Ticket(NamedTuple):
    """A sample by its place and its size; whoever needs it makes it again.

    Attributes:
        group: of the mixture.
        position: place in the group's endless order.
        since: packs the lane had made when it was read.
        tokens: it takes in a pack.
        planned: tokens it would take if none of its conditions had been left out.
        loss_tokens: predictions it is trained on.
        pairs: (query, key) pairs that attention computes.
    """

    group: str
    position: int
    since: int
    tokens: int
    planned: int
    loss_tokens: int
    pairs: int

    @property
    def amount(self) -> Amount:
        return Amount(1, self.tokens, self.loss_tokens)


NO_LANE = -1
"""Lane of a pack that holds nothing because its rank's lanes have ended."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneCursor:
    """Where one lane stands: the whole data state of that lane, JSON-able.

    Attributes:
        packs: packs this lane has emitted.
        draws: random group choices made.
        read: per group, records taken from the lane's share of the group's order.
        rejected: per group and reason, records that could not be used; tokens where they were counted.
        lost: per group, samples that are in no pack (only `--packer upstream_compat` loses any).
        waiting: samples read and not yet packed, in order.
        recent: tokens and pairs of the samples read of late, older ones weighing less.
    """

    lane: int
    packs: int = 0
    draws: int = 0
    read: Mapping[str, Amount] = field(default_factory=dict)
    rejected: Mapping[str, Mapping[str, Amount]] = field(default_factory=dict)
    lost: Mapping[str, Amount] = field(default_factory=dict)
    waiting: tuple[Ticket, ...] = ()
    recent: tuple[float, float] = (0.0, 0.0)

    def to_json(self) -> dict[str, Any]:
        return {
            "lane": self.lane,
            "packs": self.packs,
            "draws": self.draws,
            "read": amounts_to_json(self.read),
            "rejected": {g: amounts_to_json(r) for g, r in self.rejected.items()},
            "lost": amounts_to_json(self.lost),
            "waiting": [list(w) for w in self.waiting],
            "recent": list(self.recent),
        }

    @staticmethod
    def from_json(state: Mapping[str, Any]) -> "LaneCursor":
        """The cursor that `to_json` wrote.

        Raises:
            ValueError: if it is of a version that did not keep all of this.
        """
        try:
            return LaneCursor(
                lane=state["lane"],
                packs=state["packs"],
                draws=state["draws"],
                read=amounts_from_json(state["read"]),
                rejected={g: amounts_from_json(r) for g, r in state["rejected"].items()},
                lost=amounts_from_json(state["lost"]),
                waiting=tuple(Ticket(*w) for w in state["waiting"]),
                recent=(state["recent"][0], state["recent"][1]),
            )
        except (KeyError, TypeError) as e:
            raise ValueError(
                "the checkpoint's data state is of an earlier version of Weft, which kept less; start a new run from its "
                "weights with --resume_from and --resume_model_only True"
            ) from e


def amounts_to_json(amounts: Mapping[str, Amount]) -> dict[str, list[int]]:
    return {name: amount.to_json() for name, amount in amounts.items()}


def amounts_from_json(state: Mapping[str, Any]) -> dict[str, Amount]:
    return {name: Amount(*numbers) for name, numbers in state.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """Several samples in one sequence: the input of one forward pass. No field is optional; what is absent is empty.

    Letters: `s` packed tokens, `t` text tokens, `v` ViT patches, `l` latent patches, `n` und images, `m` VAE images, `c` labels.

    Attributes:
        text_ids, text_index: `t` int64, ids (with all begin, end and image marker tokens) and their places in the sequence.
        position: `s` int64, rotary position of every token.
        label_ids, label_index: `c` int64, what the token at that place has to predict.
        label_weight: `c` float32.
        label_role: `c` int64, place in ROLES of what each is a part of.
        und_patches: `v (p p 3)` uint8 pixels, row-major patches, channel fastest.
        und_position, und_index: `v` int64, place in the 2-D position table; place in the sequence.
        und_hw: `n 2` int64, patch rows and columns of each image.
        und_views: `3 hh ww` uint8 each, the same `n` images as encoders inside heads want them; `3 0 0` where none was asked for.
        gen_pixels: `3 hh ww` uint8 each, the `m` images that pass the VAE, condition and target, in sequence order.
        gen_hw: `m 2` int64, latent patch rows and columns.
        gen_position, gen_index: `l` int64; gen_timestep: `l` float32, 0 for clean patches.
        gen_seed, gen_key: `m` int64, noise seed and a hash of the pixels (key of the latent cache).
        regions: per perception head; a head without regions in this pack is simply absent.
        sample_lens, split_lens, split_modes, split_branches: the attention layout; splits follow each other over all samples.
        origins, tasks: origin and task of each sample, in order.
        cursor, rejects: what the data state is once this pack is consumed.
        hash: of the tensors and the layout, for the journal; empty if nobody asked.
    """

    text_ids: Tensor
    text_index: Tensor
    position: Tensor
    label_ids: Tensor
    label_index: Tensor
    label_weight: Tensor
    label_role: Tensor
    und_patches: Tensor
    und_position: Tensor
    und_index: Tensor
    und_hw: Tensor
    und_views: tuple[Tensor, ...]
    gen_pixels: tuple[Tensor, ...]
    gen_hw: Tensor
    gen_position: Tensor
    gen_index: Tensor
    gen_timestep: Tensor
    gen_seed: Tensor
    gen_key: Tensor
    regions: Mapping[str, RegionBatch]
    sample_lens: tuple[int, ...]
    split_lens: tuple[int, ...]
    split_modes: tuple[Mode, ...]
    split_branches: tuple[int, ...]
    origins: tuple[Origin, ...] = ()
    tasks: tuple[str, ...] = ()
    cursor: LaneCursor = LaneCursor(lane=0)
    rejects: tuple[Reject, ...] = ()
    hash: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.position)

    @property
    def is_filler(self) -> bool:
        """Whether it is from no lane: its rank's lanes have ended, and it takes part in the step with nothing."""
        return self.cursor.lane == NO_LANE

    def map(self, fn: Callable[[Tensor], Tensor]) -> "PackedBatch":
        """Apply `fn` to every tensor: the only walker over the fields."""
        changed: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if isinstance(value, Tensor):
                changed[f.name] = fn(value)
        changed["gen_pixels"] = tuple(fn(p) for p in self.gen_pixels)
        changed["und_views"] = tuple(fn(p) for p in self.und_views)
        changed["regions"] = {head: r.map(fn) for head, r in self.regions.items()}
        return replace(self, **changed)

    def to(self, device: torch.device) -> "PackedBatch":
        return self.map(lambda x: x.to(device, non_blocking=True))

    def pin_memory(self) -> "PackedBatch":
        return self.map(lambda x: x.pin_memory())
