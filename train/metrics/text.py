"""Text answers against the truth."""

from dataclasses import dataclass

from train.metrics.base import SummedMetric, ratio

LEVELS = "/"
"""Between the levels of a caption, from the general to the particular: `cable/fibre/bent too sharply`."""


def normalise(text: str) -> str:
    """Lower case, ends stripped, every run of white space one space."""
    return " ".join(text.lower().split())


def levels(text: str) -> tuple[str, ...]:
    """The levels of a caption; one without `/` has one."""
    return tuple(normalise(level) for level in text.split(LEVELS))


def shared_levels(a: str, b: str) -> int:
    """How many levels two captions share, from the first on."""
    shared = 0
    for x, y in zip(levels(a), levels(b), strict=False):
        if x != y:
            break
        shared += 1
    return shared


def edit_distance(a: str, b: str) -> int:
    """Fewest characters to insert, delete or replace that make one text the other."""
    before = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (x != y)))
        before = row
    return before[-1]


@dataclass(kw_only=True)
class ExactMatch(SummedMetric):
    """Share of answers that equal the truth after `normalise`."""

    correct: int = 0
    count: int = 0

    def update(self, answer: str, truth: str) -> None:
        self.correct += normalise(answer) == normalise(truth)
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {"exact": ratio(self.correct, self.count)}


@dataclass(kw_only=True)
class CaptionMatch(SummedMetric):
    """Captions of things, whose levels are parted by `/`.

    `caption_exact`: all levels equal. `caption_type`: the first is. `caption_levels`: levels shared from the first on, of all
    that the truths have. `caption_error`: edits per character of the truths. No caption counts as an empty one.
    """

    exact: int = 0
    first: int = 0
    shared: int = 0
    levels: int = 0
    edits: int = 0
    characters: int = 0
    count: int = 0

    def update(self, said: str | None, truth: str) -> None:
        said = said or ""
        shared, wanted = shared_levels(said, truth), len(levels(truth))
        self.exact += levels(said) == levels(truth)
        self.first += shared > 0
        self.shared += shared
        self.levels += wanted
        self.edits += edit_distance(normalise(said), normalise(truth))
        self.characters += len(normalise(truth))
        self.count += 1

    def compute(self) -> dict[str, float]:
        return {
            "caption_exact": ratio(self.exact, self.count),
            "caption_type": ratio(self.first, self.count),
            "caption_levels": ratio(self.shared, self.levels),
            "caption_error": ratio(self.edits, self.characters),
        }
