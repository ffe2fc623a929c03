"""All objects of a picture as a set of boxes: queries that look at its grid, each round from a better place (head `detr`).

What is where, how sure, and what it is called. The head sees the picture and what precedes it in the text, never the answer.
Sources: DETR (arXiv 2005.12872), boxes refined layer by layer and first places picked from the grid (2010.04159), places as
boxes (2201.12329), a window around each place (2101.07448).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling.heads.attending import Adapter, QueryLayer, closed, perceptron, sine_code
from modeling.heads.grids import gather_patches
from modeling.heads.head import PerceptionHead
from modeling.heads.phrases import PhraseDecoder
from modeling.ops.boxes import centre_to_corners, corners_to_centre
from modeling.ops.matching import OUT_OF_REACH, MatchCost, assign, match_costs
from modeling.types import DetrOutput, DetrStage, HeadInputs

Memory = Literal["vision", "states", "both"]
Caption = Literal["words", "classes", "none"]
RARE = -4.595
"""Logit of 0.01: at the start hardly anything is an object, so that the many queries without one do not drown the others."""
LOGIT_EPS = 1e-4


class Picture(NamedTuple):
    """What the queries look at, one row per region: `memory r n d`, `place r n d`, `valid r n`, `centre r n 2`, `cell r 2`."""

    memory: Tensor
    place: Tensor
    valid: Tensor
    centre: Tensor
    cell: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Detection:
    """One object that was found.

    Attributes:
        box: xyxy in [0, 1].
        score: in [0, 1], how sure.
        ids: token ids of what it is called; empty if the head says nothing.
        class_index: which of the head's classes, if it has a table.
    """

    box: tuple[float, float, float, float]
    score: float
    ids: tuple[int, ...] = ()
    class_index: int | None = None


class DetrHead(PerceptionHead):
    """A set of boxes per picture.

    The anchor is the picture's closing token; its state, which knows the text before the picture, is added to every query.

    Args:
        hidden_size, grid_size, patch_size: of the model.
        width, num_heads, num_layers, feed_forward: of the queries' layers.
        num_queries: how many objects can be found at most.
        memory: what is looked at: the tower's features, the trunk's states at the picture's own patches, or their sum.
        detach_states: let no gradient pass from the head to the trunk.
        adapter_ratio: hidden width of the residual bottleneck before each projection is its width by this; 0: none.
        references: where the queries start: `learned` places, or `selected`, the grid's most promising cells.
        auxiliary: every layer is taught, not only the last.
        no_object_weight: None: each score is a yes or no of its own (focal loss); else "no object" is one more class (softmax),
            whose errors have this weight (published: 0.1).
        match_cost: weights of score, L1 and GIoU in the matching.
        caption: what is said of an object: `words` of the language model, which of the `classes`, or nothing.
        class_ids: of `classes`: token ids of each name.
        caption_layers, caption_near: layers of the phrases' decoder, and how many places around an object it sees.
        longest_phrase: most words of a phrase at inference.

    Raises:
        ValueError: if the options contradict each other.
    """

    predicts = "detr"
    exact = True  # bf16 tells places of a large picture apart by 2 px only

    def __init__(
        self,
        *,
        hidden_size: int,
        grid_size: int,
        patch_size: int,
        width: int = 256,
        num_heads: int = 8,
        num_layers: int = 3,
        feed_forward: int = 1024,
        num_queries: int = 100,
        memory: Memory = "both",
        detach_states: bool = False,
        adapter_ratio: int = 8,
        references: Literal["learned", "selected"] = "selected",
        auxiliary: bool = True,
        no_object_weight: float | None = None,
        match_cost: Sequence[float] = (2.0, 5.0, 2.0),
        caption: Caption = "words",
        class_ids: Sequence[Sequence[int]] = (),
        caption_layers: int = 2,
        caption_near: int = 16,
        longest_phrase: int = 32,
    ):
        super().__init__()
        _check(width, num_heads, num_queries, memory, references, caption, class_ids)
        self.width, self.num_queries, self.longest_phrase = width, num_queries, longest_phrase
        self.detach_states, self.auxiliary, self.caption = detach_states, auxiliary, caption
        self.no_object_weight = no_object_weight
        self.cost = MatchCost(**dict(zip(("score", "l1", "giou"), match_cost, strict=True)))
        self.class_ids = tuple(tuple(ids) for ids in class_ids)
        sizes = {"grid": grid_size, "states": hidden_size}
        names = {"vision": ("grid",), "states": ("states",), "both": ("grid", "states")}[memory]
        self.adapters = nn.ModuleDict({n: Adapter(sizes[n], adapter_ratio) for n in names if adapter_ratio})
        self.project = nn.ModuleDict({n: nn.Linear(sizes[n], width) for n in names})
        self.project_norm = nn.ModuleDict({n: nn.LayerNorm(width) for n in names})
        self.prompt = nn.Linear(hidden_size, width)
        self.query = nn.Embedding(num_queries, width)
        self.place = perceptron(2 * width, width, 2)
        self.layers = nn.ModuleList(QueryLayer(width, num_heads, feed_forward) for _ in range(num_layers))
        self.focus = nn.Embedding(num_layers, num_heads)
        self.norm, self.box = nn.LayerNorm(width), perceptron(width, 4)
        # A table's classes are scored by what their names mean to the language model.
        self.score = nn.Linear(hidden_size, width) if caption == "classes" else nn.Linear(width, 1)
        self.nothing = None if no_object_weight is None else nn.Linear(width, 1)
        self.reference = nn.Embedding(num_queries, 4) if references == "learned" else None
        self.cell_norm = nn.LayerNorm(width) if references == "selected" else None
        self.cell_box = perceptron(width, 4) if references == "selected" else None
        self.cell_score = nn.Linear(width, 1) if references == "selected" else None
        self.phrases = (
            PhraseDecoder(
                hidden_size=hidden_size,
                width=width,
                num_heads=num_heads,
                num_layers=caption_layers,
                feed_forward=feed_forward,
                near=caption_near,
            )
            if caption == "words"
            else None
        )

    @classmethod
    def most_objects(cls, options: Mapping[str, Any]) -> int:
        """One per query."""
        return int(options.get("num_queries", cls.options()["num_queries"].default))

    def forward(self, inputs: HeadInputs) -> DetrOutput:
        """Look for everything in the pictures, and match it with what is there, where the regions say that."""
        regions = inputs.regions
        picture = self._look(inputs)
        truth = corners_to_centre(regions.boxes.float())
        # The anchor's state says what the text before the picture asks for.
        asked = self.prompt(self._of_trunk(inputs.hidden))
        x = self.query.weight[None] + asked[:, None]
        named = self._names(inputs)
        stages: list[DetrStage] = []
        at, first = self._start(picture)
        stages += [first] if first is not None else []
        for i, layer in enumerate(self.layers):
            place = self.place(sine_code(at.sigmoid(), self.width // 2).to(x.dtype))
            x = layer(x, place, picture.memory, picture.place, at=self._window(i, at.sigmoid(), picture))
            said = self.norm(x)
            at = at + self.box(said).float()
            stages.append(self._stage(self._logits(said, named), at))
            at = at.detach()
        if not self.auxiliary:
            stages = [s for s in (first, stages[-1]) if s is not None]
        classes = self._classes(inputs)
        matched = tuple(self._match(stages, truth, classes, inputs))
        states, known = self._phrase_states(inputs, matched[-1], said, stages[-1].boxes, picture)
        return DetrOutput(
            stages=tuple(stages),
            matched=matched,
            classes=classes,
            no_object_weight=self.no_object_weight,
            states=said,
            picture=tuple(picture),
            phrase_states=states,
            phrase_known=known,
        )

    # ------------------------------------------------------------------------------------------------------ the picture

    def _of_trunk(self, states: Tensor) -> Tensor:
        return (states.detach() if self.detach_states else states).to(self.query.weight.dtype)

    def _look(self, inputs: HeadInputs) -> Picture:
        grids, image = inputs.grids, inputs.regions.image
        streams = {"grid": grids.values, "states": self._of_trunk(grids.states)}
        rows: Tensor | None = None
        for name in self.project:
            x = streams[name].to(self.query.weight.dtype)
            x = self.adapters[name](x) if name in self.adapters else x
            x = self.project_norm[name](self.project[name](x))
            rows = x if rows is None else rows + x
        assert rows is not None
        memory, valid, centre = gather_patches(replace(grids, values=rows), image)
        hw = torch.tensor(grids.hw or [(1, 1)], device=image.device)[image]
        place = sine_code(centre, self.width // 2).to(memory.dtype)
        return Picture(memory, place, valid, centre, 1 / hw.flip(1).float())

    def _start(self, picture: Picture) -> tuple[Tensor, DetrStage | None]:
        """Where the queries look first, `r q 4` logits of cx cy w h without gradient or learned; and what each cell would say."""
        if self.reference is not None:
            spread = _spread(self.num_queries, picture.memory.device)
            at = spread.logit() + self.reference.weight.float()
            return at[None].expand(len(picture.memory), -1, -1), None
        assert self.cell_norm is not None and self.cell_box is not None and self.cell_score is not None
        seen = self.cell_norm(picture.memory)
        size = (2 * picture.cell).clamp(max=0.5)[:, None].expand_as(picture.centre)
        cells = torch.cat([picture.centre, size], dim=-1).logit(eps=LOGIT_EPS)
        at = cells + self.cell_box(seen).float()
        stage = self._stage(self.cell_score(seen).float() + RARE, at, picture.valid)
        ranks = stage.logits[..., 0].detach().masked_fill(~picture.valid, float("-inf"))
        best = ranks.argsort(dim=1, descending=True, stable=True)
        # A small picture has fewer cells than there are queries: several start at one cell.
        turn = torch.arange(self.num_queries, device=best.device)[None] % picture.valid.sum(1, keepdim=True)
        index = best.gather(1, turn)
        return at.detach().gather(1, index[..., None].expand(-1, -1, 4)), stage

    def _window(self, layer: int, boxes: Tensor, picture: Picture) -> Tensor:
        """Bias `r heads q n` of the look at the picture: what is far from a query's box, in sizes of it, is seen less."""
        size = boxes[:, :, None, 2:].clamp(min=1e-2)
        far = ((picture.centre[:, None] - boxes[:, :, None, :2]) / size).square().sum(-1)
        narrow = F.softplus(self.focus.weight[layer].float())
        return closed(picture.valid)[:, None, None] - narrow[None, :, None, None] * far[:, None]

    # ------------------------------------------------------------------------------------------------------- the answer

    def _names(self, inputs: HeadInputs) -> Tensor | None:
        """`c d`, what the table's names mean."""
        if self.caption != "classes":
            return None
        ids = _padded(self.class_ids, inputs.hidden.device)
        known = (ids >= 0).float()[..., None]
        words = inputs.embed(ids.clamp(min=0)).float() * known
        mean = words.sum(1) / known.sum(1)
        names: Tensor = self.score(mean.to(self.score.weight.dtype))
        return names

    def _logits(self, said: Tensor, named: Tensor | None) -> Tensor:
        """`r q c` float32, with "no object" as the last where all compete."""
        raw = self.score(said) if named is None else said @ named.T * self.width**-0.5
        if self.nothing is None:
            return raw.float() + RARE
        return torch.cat([raw, self.nothing(said)], dim=-1).float()

    def _stage(self, logits: Tensor, at: Tensor, valid: Tensor | None = None) -> DetrStage:
        everywhere = torch.ones(at.shape[:2], dtype=torch.bool, device=at.device)
        return DetrStage(logits=logits, boxes=at.sigmoid(), valid=everywhere if valid is None else valid)

    def _classes(self, inputs: HeadInputs) -> Tensor:
        """`b`, which class each true box is of; 0 where there are no classes.

        Raises:
            ValueError: if a phrase is none of them.
        """
        lens = inputs.regions.phrase_lens
        if self.caption != "classes" or not len(lens):
            return torch.zeros_like(lens)
        phrases = [tuple(ids) for ids in _split(inputs.regions.phrase_ids.tolist(), lens.tolist())]
        table = {ids: i for i, ids in enumerate(self.class_ids)}
        # A phrase ends with the token that ends a text; a class is its name alone.
        found = [table.get(ids, table.get(ids[:-1])) for ids in phrases]
        if None in found:
            raise ValueError(
                f"head detr: the phrase with the token ids {list(phrases[found.index(None)])} is none of the "
                f"{len(self.class_ids)} of class_ids in bagel_config.json; give the data group `labels:` to have such rows named"
            )
        return torch.tensor(found, dtype=torch.int64, device=lens.device)

    def _match(
        self, stages: Sequence[DetrStage], truth: Tensor, classes: Tensor, inputs: HeadInputs
    ) -> list[Tensor]:
        regions = inputs.regions
        counts = regions.num_boxes.tolist()
        if not sum(counts):
            return [classes for _ in stages]
        # True boxes `b` -> `r t`, pictures with fewer filled up behind.
        region = regions.box_region
        first = regions.num_boxes.cumsum(0) - regions.num_boxes
        at = (region, torch.arange(len(truth), device=truth.device) - first[region])
        boxes = truth.new_full((len(counts), max(counts), 4), 0.5)
        boxes[at] = truth
        called = classes.new_zeros(boxes.shape[:2])
        called[at] = classes
        costs = []
        for stage in stages:
            with_none = stage.logits.shape[-1] > 1 and self.no_object_weight is not None
            # The cells are asked for objects, not for which.
            which = called.clamp(max=stage.logits.shape[-1] - 1 - with_none)
            cost = match_costs(stage.logits, stage.boxes, which, boxes, with_none=with_none, cost=self.cost)
            costs.append(cost.masked_fill(~stage.valid[..., None], OUT_OF_REACH))
        return assign(costs, counts)

    # --------------------------------------------------------------------------------------------------------- in words

    def _phrase_states(
        self, inputs: HeadInputs, matched: Tensor, said: Tensor, boxes: Tensor, picture: Picture
    ) -> tuple[Tensor, Tensor]:
        """`q e`, from which the vocabulary tells each token of the true phrases; and which of them have a query, `q`."""
        lens, ids = inputs.regions.phrase_lens, inputs.regions.phrase_ids
        if self.phrases is None:
            return inputs.hidden[:0], torch.zeros(0, dtype=torch.bool, device=ids.device)
        own = lens > 0
        query, lens = matched[own], lens[own]
        rows = query.clamp(min=0)
        words = _padded(_split(ids.tolist(), lens.tolist()), ids.device)
        there = words >= 0
        before = inputs.embed(words[:, :-1].clamp(min=0))  # what comes before each word: shifted by one
        state = said.flatten(0, 1)[rows]
        of = torch.div(rows, self.num_queries, rounding_mode="floor")
        box = boxes.detach().flatten(0, 1)[rows]
        around = self.phrases.around(picture.memory[of], picture.valid[of], picture.centre[of], box)
        states = self.phrases(state, before, *around)
        return states[there], (query >= 0)[:, None].expand_as(there)[there]

    @torch.no_grad()
    def detections(
        self, output: DetrOutput, inputs: HeadInputs, *, threshold: float, end: int, most: int | None = None
    ) -> list[list[Detection]]:
        """What was found in each picture, the surest first.

        Args:
            output: of `forward` for these inputs.
            inputs: for the language model's words.
            threshold: least score of an object.
            end: id that ends a phrase.
            most: at most so many per picture.

        Returns:
            per region; an object's score is how sure it is that there is one, times the root of how sure its words are.
        """
        stage, picture = output.stages[-1], Picture(*output.picture)
        p = stage.logits.sigmoid() if self.nothing is None else stage.logits.softmax(-1)[..., :-1]
        scores, classes = p.max(-1)
        found: list[list[Detection]] = []
        for i in range(len(scores)):
            order = scores[i].argsort(descending=True, stable=True)[:most]
            kept = order[scores[i][order] >= threshold]
            boxes = stage.boxes[i, kept]
            sure = scores[i, kept]
            ids: list[list[int]] = [[] for _ in kept]
            if self.phrases is not None and len(kept):
                of = torch.full_like(kept, i)
                around = self.phrases.around(picture.memory[of], picture.valid[of], picture.centre[of], boxes)
                ids, certain = self.phrases.say(
                    output.states[i, kept],
                    *around,
                    embed=inputs.embed,
                    vocabulary=lambda x: inputs.vocabulary(x.to(inputs.vocabulary.weight.dtype)),
                    end=end,
                    longest=self.longest_phrase,
                )
                sure = sure * certain.sqrt()
            table = self.caption == "classes"
            found.append(
                [
                    Detection(
                        box=tuple(box),
                        score=score,
                        ids=self.class_ids[c] if table else tuple(said),
                        class_index=c if table else None,
                    )
                    for box, score, said, c in zip(
                        centre_to_corners(boxes).clamp(0, 1).tolist(),
                        sure.tolist(),
                        ids,
                        classes[i, kept].tolist(),
                        strict=True,
                    )
                ]
            )
        return [sorted(row, key=lambda d: -d.score) for row in found]


def _spread(count: int, device: torch.device) -> Tensor:
    """`count 4` cx cy w h: points that fill the square evenly (Kronecker's sequence of the plastic number), of a fifth of it."""
    plastic = 1.32471795724474602596
    steps = torch.arange(1, count + 1, device=device, dtype=torch.float32)[:, None]
    centre = (0.5 + steps * torch.tensor([1 / plastic, 1 / plastic**2], device=device)) % 1
    return torch.cat([centre * 0.96 + 0.02, torch.full_like(centre, 0.2)], dim=1)


def _split(ids: Sequence[int], lens: Sequence[int]) -> list[Sequence[int]]:
    rows, start = [], 0
    for length in lens:
        rows.append(ids[start : start + length])
        start += length
    return rows


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """`c w` int64, -1 behind each row's end; at least one column."""
    longest = max((len(row) for row in rows), default=0) or 1
    filled = [[*row, *[-1] * (longest - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64, device=device).reshape(len(rows), longest)


def _check(
    width: int,
    num_heads: int,
    num_queries: int,
    memory: str,
    references: str,
    caption: str,
    class_ids: Sequence[Sequence[int]],
) -> None:
    where = "bagel_config.json: heads.detr"
    if width % num_heads or width % 4:
        raise ValueError(f"{where}: width {width} must be a multiple of 4 and of num_heads {num_heads}")
    if num_queries < 1:
        raise ValueError(f"{where}: num_queries must be at least 1, not {num_queries}")
    for name, value, known in (
        ("memory", memory, get_args(Memory)),
        ("caption", caption, get_args(Caption)),
        ("references", references, ("learned", "selected")),
    ):
        if value not in known:
            raise ValueError(f"{where}: {name} must be one of {', '.join(known)}, not {value!r}")
    if (caption == "classes") != bool(class_ids):
        raise ValueError(
            f"{where}: class_ids (token ids of each name) is for caption classes, and needed there; "
            "`python -m scripts.detection.classes` writes it"
        )
