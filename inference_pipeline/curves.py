"""Training curves as inline SVG: the lines of train_log.jsonl in, one small chart per numeric key out. Used by `report.py`."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

Points = list[tuple[float, float]]

WIDTH, HEIGHT = 376, 196
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 26
MAX_POINTS = 400

TITLES = {
    "loss": "weighted total",
    "ce": "text, cross-entropy",
    "mse": "flow, mean squared error",
    "box_l1": "box, L1",
    "box_giou": "box, generalised IoU",
    "mask_bce": "mask, BCE",
    "mask_dice": "mask, Dice",
    "lr": "learning rate",
    "total_norm": "gradient norm",
    "tokens_per_sec": "tokens per second",
}
"""Key of the log -> what a person calls it, in the order of the page; keys not named here follow in the log's order."""

HIDDEN = {
    "step",
    "time",
    "timestamp",
    "elapsed_s",
    "eta_s",
    "time_left_s",
    "epoch",
    "num_steps",
    "total_steps",
    "phases",
    "mem_rss",
    "mem_allocated",
    "mem_cache",
}
LINEAR = {"lr", "tokens_per_sec"}
EXACT = {"lr"}
"""Set, not measured: drawn as they are."""


def read_log(path: Path) -> dict[str, Points]:
    """The numeric values of a JSON-lines log, by key, as (step, value) points in order of step.

    A line that is not JSON is left out (a killed run may have cut its last one), and so are values that are not finite. Where a
    resumed run wrote a step again, the later line counts.
    """
    by_step: dict[str, dict[float, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines()):
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not isinstance(entry, dict):
            continue
        step = entry.get("step", number)
        for key, value in _flatten(entry):
            if key not in HIDDEN and math.isfinite(value):
                by_step.setdefault(key, {})[step] = value
    known = {key: by_step[key] for key in TITLES if key in by_step}
    return {key: sorted(values.items()) for key, values in {**known, **by_step}.items()}


def _flatten(entry: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Numbers at the top level and one level below (`losses: {ce: ...}` gives `ce`)."""
    values: list[tuple[str, float]] = []
    for key, value in entry.items():
        if isinstance(value, Mapping) and key not in HIDDEN:
            values += [(k, float(v)) for k, v in value.items() if _is_number(v)]
        elif _is_number(value):
            values.append((key, float(value)))
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _runs(points: Points, limit: int) -> list[Points]:
    """The points in at most `limit` equal runs of neighbours."""
    count = min(limit, len(points))
    edges = [round(i * len(points) / count) for i in range(count + 1)]
    return [points[a:b] for a, b in pairwise(edges)]


def envelope(points: Points, limit: int = MAX_POINTS) -> Points:
    """A line through every value if there are few, through the least and the greatest of each run of neighbours if many."""
    if len(points) <= limit:
        return points
    return [
        (run[0][0], extreme)
        for run in _runs(points, limit // 2)
        for extreme in (min(y for _, y in run), max(y for _, y in run))
    ]


def smooth(points: Points, span: float = 0.04, limit: int = MAX_POINTS) -> Points:
    """Running mean over a window of `span` of the points, cut off at the two ends; at most `limit` points of it."""
    half = max(1, round(len(points) * span / 2))
    sums = [0.0, *accumulate(y for _, y in points)]
    wanted = {run[-1][0] for run in _runs(points, limit)}
    smoothed: Points = []
    for i, (step, _) in enumerate(points):
        if step in wanted:
            low, high = max(i - half, 0), min(i + half + 1, len(points))
            smoothed.append((step, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers (1, 2, 2.5 or 5 times a power of ten) inside [low, high], about `count` of them."""
    raw = (high - low) / max(count, 1)
    if raw <= 0:
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten inside [low, high], with 2 and 5 times them where the range is short."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5)):
        ticks = [m * 10.0**d for d in decades for m in multiples if low <= m * 10.0**d <= high]
        if len(ticks) >= 3:
            break
    return ticks[:: math.ceil(len(ticks) / 5)] or [low, high]


def format_value(value: float) -> str:
    """A number short enough for an axis: 12k, 0.05, 2e-4."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 10_000:
        return f"{value / 1000:.3g}k"
    if size < 0.01:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa.removesuffix('.0')}e{int(exponent)}"
    return f"{value:.3g}" if size < 1000 else f"{value:.0f}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """Where steps and values lie in a chart, in its own units."""

    first: float
    last: float
    low: float
    high: float
    logarithmic: bool

    @classmethod
    def around(cls, points: Points, *, linear: bool) -> "Axes":
        """Axes that hold all points; 0 is on them unless the values stay far from it."""
        values = [y for _, y in points]
        low, high = min(values), max(values)
        # More than a decade hides the tail on a linear axis, and 0 has no place on the other.
        logarithmic = not linear and low > 0 and high / low > 12
        if not logarithmic and (0 <= low < 0.6 * high or low == high > 0):
            low, high = 0.0, high * 1.05
        if low == high:
            high = low + 1.0
        return cls(first=points[0][0], last=points[-1][0], low=low, high=high, logarithmic=logarithmic)

    def x(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (step - self.first) / max(self.last - self.first, 1e-9)

    def y(self, value: float) -> float:
        low, high = self.low, self.high
        if self.logarithmic:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - low) / (high - low)

    def path(self, points: Points) -> str:
        return "M" + "L".join(f"{self.x(step):.1f} {self.y(value):.1f}" for step, value in points)

    def drawn(self) -> str:
        ticks = log_ticks(self.low, self.high) if self.logarithmic else nice_ticks(self.low, self.high)
        rows = [
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(t):.1f}" y2="{self.y(t):.1f}"/>'
            f'<text class="tick" x="{LEFT - 8}" y="{self.y(t) + 3.5:.1f}" text-anchor="end">{format_value(t)}</text>'
            for t in ticks
        ]
        columns = [
            f'<text class="tick" x="{self.x(t):.1f}" y="{HEIGHT - 8}" text-anchor="middle">{format_value(t)}</text>'
            for t in nice_ticks(self.first, self.last)
            if t == int(t)
        ]
        return "".join(rows + columns)


def chart(key: str, points: Points) -> str:
    """One chart: the values faint, their running mean over them, the last mean written out."""
    raw, line = envelope(points), smooth(points)
    if key in EXACT:
        raw = line = [run[-1] for run in _runs(points, MAX_POINTS)]
    axes = Axes.around(points, linear=key in LINEAR)
    title = TITLES.get(key, "")
    names = f"<b>{escape(title)}</b><code>{escape(key)}</code>" if title else f"<b>{escape(key)}</b>"
    first, (last_step, last) = line[0][1], line[-1]
    label = f"{title or key}: from {format_value(first)} to {format_value(last)} at step {last_step:.0f}"
    return (
        f'<figure class="curve"><figcaption>{names}{"<i>log</i>" if axes.logarithmic else ""}'
        f"<span>{format_value(last)}</span></figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">{axes.drawn()}'
        f'<path class="raw" d="{axes.path(raw)}"/><path class="mean" d="{axes.path(line)}"/>'
        f'<circle class="end" cx="{axes.x(last_step):.1f}" cy="{axes.y(last):.1f}" r="3"/></svg></figure>'
    )


def charts(log: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """All charts of a log, one per key with at least two points."""
    return "".join(chart(key, list(points)) for key, points in log.items() if len(points) > 1)
