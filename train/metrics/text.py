"""Text answers against the truth."""

from dataclasses import dataclass

from train.metrics.base import SummedMetric, ratio


def normalise(text: str) -> str:
    """Lower case, ends stripped, every run of white space one space."""
    return " ".join(text.lower().split())


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
