"""Boxes written as text, `[0.100,0.200,0.300,0.400]`: the alternative to `<BOX>`, in the forms that published systems use.

Shikra and PerceptionGPT write fractions with three digits, several boxes in one bracket with `;` between; others write whole
thousandths, pixels, or a token per thousandth.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Box = Sequence[float]
"""xyxy in [0, 1]."""

THOUSAND = 1000
FORMS = ("fraction", "thousandths", "pixels", "bins")

_BRACKETS = {"square": (r"\[", r"\]"), "round": (r"\(", r"\)")}
_FRACTION, _WHOLE = r"\d(?:\.\d*)?", r"\d{1,5}"


@dataclass(frozen=True, slots=True)
class BoxText:
    """One form of boxes in texts.

    Attributes:
        form: `fraction` of the picture's sides (`0.123`), `thousandths` (`123`), `pixels` of the picture that the model sees, or
            `bins`: `<b_st><bin_123> <bin_200> <bin_300> <bin_400><b_ed>`, tokens if the vocabulary has them.
        digits: of a fraction, after the point.
        brackets: `square` or `round`; `bins` have their own.

    Raises:
        ValueError: for another form or other brackets, or no digits.
    """

    form: str = "fraction"
    digits: int = 3
    brackets: str = "square"

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ValueError(f"the form of boxes in texts is one of {', '.join(FORMS)}, not {self.form!r}")
        if self.brackets not in _BRACKETS:
            raise ValueError(f"brackets must be square or round, not {self.brackets!r}")
        if not 1 <= self.digits <= 6:
            raise ValueError(f"a fraction has 1 to 6 digits, not {self.digits}")

    def write(self, boxes: Sequence[Box], size: tuple[int, int] = (1, 1)) -> str:
        """Boxes in one bracket; `size`: width and height of the picture, for pixels."""
        if self.form == "bins":
            inner = "<b_sep>".join(" ".join(f"<bin_{round(v * THOUSAND)}>" for v in box) for box in boxes)
            return f"<b_st>{inner}<b_ed>"
        left, right = (bracket[1:] for bracket in _BRACKETS[self.brackets])
        inner = ";".join(
            ",".join(self._number(v, side) for v, side in zip(box, (*size, *size), strict=True))
            for box in boxes
        )
        return f"{left}{inner}{right}"

    def read(self, text: str, size: tuple[int, int] = (1, 1)) -> list[list[tuple[float, ...]]]:
        """The boxes of every bracket in a text, xyxy in [0, 1] where it keeps to the form; what does not is no box."""
        return [self._boxes(match.group(1), size) for match in self._pattern().finditer(text)]

    def replace(self, text: str, change: Callable[[Box], Box], size: tuple[int, int] = (1, 1)) -> str:
        """The text with every box changed."""
        return self._pattern().sub(
            lambda match: self.write([change(box) for box in self._boxes(match.group(1), size)], size), text
        )

    def _number(self, value: float, side: int) -> str:
        if self.form == "fraction":
            return f"{value:.{self.digits}f}"
        return str(round(value * (side if self.form == "pixels" else THOUSAND)))

    def _pattern(self) -> re.Pattern[str]:
        if self.form == "bins":
            box = r"<bin_\d+>(?: <bin_\d+>){3}"
            return re.compile(rf"<b_st>({box}(?:<b_sep>{box})*)<b_ed>")
        number = _FRACTION if self.form == "fraction" else _WHOLE
        box = rf"{number}(?:,{number}){{3}}"
        left, right = _BRACKETS[self.brackets]
        return re.compile(rf"{left}({box}(?:;{box})*){right}")

    def _boxes(self, inner: str, size: tuple[int, int]) -> list[tuple[float, ...]]:
        if self.form == "bins":
            parts = [re.findall(r"\d+", box) for box in inner.split("<b_sep>")]
        else:
            parts = [box.split(",") for box in inner.split(";")]
        sides: Sequence[float] = (*size, *size) if self.form == "pixels" else (THOUSAND,) * 4
        if self.form == "fraction":
            return [tuple(map(float, box)) for box in parts]
        return [tuple(int(v) / side for v, side in zip(box, sides, strict=True)) for box in parts]
