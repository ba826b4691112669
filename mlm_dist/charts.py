"""Series -> a chart: inline SVG for the curves, HTML for the words around them. It shows without any script.

The SVG is stretched to the width that the page has, so no word stands in it. Places in it are whole numbers.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from html import escape

from mlm_dist.history import Series

WIDTH, HEIGHT = 2000, 1000
DOTTED_UP_TO = 30  # points: a curve of so few has a dot at each
LOG_FROM = 10.0  # times the lowest value: what counts as far apart
LEAST_OF_LOG = 1e-100  # below it there is no room in a float
LEAST_SPAN = 0.04  # of the highest value: so that what hardly moves doesn't look wild
LETTERS = ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e4, " k"))
UNITS = {"share": " %", "seconds": " s", "megabytes": " MB", "gigabytes": " GB"}


@dataclass(frozen=True)
class Panel:
    """One chart of the page.

    metrics: patterns of names -> what the curve is called; "*" is what the pattern's * stands for
    log:     the scale is logarithmic where the values lie far apart
    late:    the last half is drawn again, by itself: the beginning would hide what moves there
    points:  dots alone: there is nothing between two values
    """

    section: str
    title: str
    metrics: Mapping[str, str]
    unit: str = ""
    note: str = ""
    wide: bool = False
    log: bool = False
    points: bool = False
    late: bool = False

    def label(self, name: str) -> str | None:
        """What a metric is called in this chart; None where it isn't in it."""
        for pattern, label in self.metrics.items():
            if fnmatchcase(name, pattern):
                before, _, after = pattern.partition("*")
                return label.replace("*", name[len(before) : len(name) - len(after)])
        return None


@dataclass(frozen=True)
class Curve:
    """One line of a chart. `style` tells apart what has the same colour."""

    label: str
    colour: int
    style: int
    series: Series  # thinned
    means: Series | None  # where it is: what the extremes lie around
    not_finite: Sequence[int]  # steps


@dataclass(frozen=True)
class Span:
    """The part of an axis, "steps" or "tokens", that a chart shows."""

    axis: str
    first: int
    last: int

    def place(self, at: int) -> int:
        return round(WIDTH * (at - self.first) / (self.last - self.first))


@dataclass(frozen=True)
class Mark:
    """A step that all charts of a run mark, with its colour."""

    colour: int
    steps: int
    tokens: int


@dataclass(frozen=True)
class Scale:
    """Values from `low` to `high`, or their logarithms, on 0 to 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high, value = (
            (math.log(x) for x in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return (value - low) / (high - low)

    def ticks(self) -> list[float]:
        """Round values within it, some three to six."""
        return log_ticks(self.low, self.high) if self.log else round_ticks(self.low, self.high)


def scale_for(values: Iterable[float], log: bool) -> Scale:
    """A scale with all finite values in it, and a little room around them. log: where they lie far apart."""
    finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
    low, high = min(finite), max(finite)
    if log and low >= LEAST_OF_LOG and high / low >= LOG_FROM:
        room = (high / low) ** 0.04
        return Scale(low / room, high * room, log=True)
    span = max(high - low, LEAST_SPAN * max(abs(low), abs(high)), 1e-12)
    middle = (low + high) / 2
    return Scale(middle - 0.54 * span, middle + 0.54 * span)


def round_ticks(low: float, high: float) -> list[float]:
    """The multiples of 1, 2 or 5 times a power of ten between two ends."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = power * next(factor for factor in (1, 2, 5, 10) if raw <= factor * power * (1 + 1e-9))
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two ends, with 2 and 5 times them where there are few."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    stride = max(1, len(powers) // 5)
    ticks = [factor * 10.0**power for power in powers[::stride] for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


# ---- words


def show(value: float | None, unit: str = "") -> str:
    """A value in as many digits as a reader wants; the script writes the values under the cursor alike."""
    if value is None:
        return "-"
    if unit == "share":
        return f"{100 * value:.4g} %"
    if unit == "seconds" and 0 < abs(value) < 0.1:
        return f"{1000 * value:.4g} ms"
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.5g}".replace("e-0", "e-")
    return text + UNITS.get(unit, "")


def label_ticks(ticks: Sequence[float], unit: str = "") -> list[str]:
    """Short words for the ticks of one axis, all in thousands, millions and so on where the largest calls for it."""
    if unit == "share":
        return [f"{100 * tick:.6g} %" for tick in ticks]
    largest = max(map(abs, ticks), default=0.0)
    size, letter = next(((size, letter) for size, letter in LETTERS if largest >= size), (1.0, ""))
    size = 1e3 if letter == " k" else size
    return [
        (f"{tick / size:,.6g}".replace("e-0", "e-") if tick else "0") + (letter if tick else "") + UNITS.get(unit, "")
        for tick in ticks
    ]


# ---- curves


def path(places: Iterable[tuple[int, int] | None]) -> str:
    """The `d` of an SVG path through the places; None breaks it. A place alone is a dot, where line ends are round."""
    parts: list[str] = []
    last: tuple[int, int] | None = None
    for place in places:
        if place is None:
            last = None
        elif last is None:
            parts.append(f"M{place[0]} {place[1]}h0")
            last = place
        else:
            parts.append(f"l{place[0] - last[0]} {place[1] - last[1]}")
            last = place
    return "".join(parts)


def places_of(series: Series, span: Span, scale: Scale) -> Iterator[tuple[int, int] | None]:
    """Where the values of a series lie in the SVG; None where one isn't finite."""
    for at, value in zip(getattr(series, span.axis), series.values, strict=True):
        yield (span.place(at), round(HEIGHT * (1 - scale.place(value)))) if math.isfinite(value) else None


def draw(curves: Sequence[Curve], marks: Sequence[Mark], scale: Scale, span: Span, points: bool) -> str:
    """The curves over one axis."""
    parts = []
    for mark in marks:
        at = getattr(mark, span.axis)
        if span.first <= at <= span.last:
            parts.append(f'<path class="mark c{mark.colour}" d="M{span.place(at)} 0v{HEIGHT}"/>')
    for curve in curves:
        places = list(places_of(curve.series, span, scale))
        if not points:
            rough = " rough" if curve.means else ""
            parts.append(f'<path class="curve{rough} c{curve.colour} s{curve.style}" d="{path(places)}"/>')
        if curve.means and not points:
            means = path(places_of(curve.means, span, scale))
            parts.append(f'<path class="curve c{curve.colour} s{curve.style}" d="{means}"/>')
        if points or len(places) <= DOTTED_UP_TO:
            dots = "".join(f"M{place[0]} {place[1]}h0" for place in places if place)
            parts.append(f'<path class="dots c{curve.colour}" d="{dots}"/>')
        along = getattr(curve.series, span.axis)
        bad = [span.place(at) for at, place in zip(along, places, strict=True) if place is None]
        if bad:
            parts.append(f'<path class="bad" d="{"".join(f"M{at} {HEIGHT}v-90" for at in bad)}"/>')
    return f'<g class="by-{span.axis}">{"".join(parts)}</g>'


def draw_axes(scale: Scale, unit: str, spans: Sequence[Span]) -> str:
    """The words along the axes."""
    ticks = scale.ticks()
    words = "".join(
        f'<span style="bottom:{100 * scale.place(tick):.2f}%">{text}</span>'
        for tick, text in zip(ticks, label_ticks(ticks, unit), strict=True)
    )
    parts = [f'<div class="ys">{words}</div>']
    for span in spans:
        ticks = round_ticks(span.first, span.last)
        words = "".join(
            f'<span style="left:{100 * span.place(tick) / WIDTH:.2f}%">{text}</span>'
            for tick, text in zip(ticks, label_ticks(ticks), strict=True)
        )
        parts.append(f'<div class="xs by-{span.axis}">{words}</div>')
    return "".join(parts)


def legend(curves: Sequence[Curve], unit: str) -> str:
    """A line for each curve: colour, name and last value; the script puts the value under the cursor in its place."""
    items = [
        f'<li><i class="key c{curve.colour} s{curve.style}"></i><span>{escape(curve.label)}</span> '
        f"<b>{show(curve.series.last(), unit)}</b></li>"
        for curve in curves
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def complaint(curves: Sequence[Curve]) -> str:
    """At which steps something wasn't finite; empty where all was."""
    texts = []
    for curve in curves:
        steps = curve.not_finite
        if steps:
            shown = ", ".join(f"{step:,}" for step in steps[:5])
            more = f" and {len(steps) - 5:,} more" if len(steps) > 5 else ""
            name = f"{escape(curve.label)}: " if curve.label else ""
            texts.append(f"{name}not finite at step{'s' if len(steps) > 1 else ''} {shown}{more}")
    return f'<p class="not-finite">{"; ".join(texts)}</p>' if texts else ""


def summary(title: str, curves: Sequence[Curve], unit: str) -> str:
    """The chart in words, for who can't see it."""
    parts = [title]
    for curve in curves:
        finite = [value for value in curve.series.values if math.isfinite(value)]
        if finite:
            parts.append(
                f"{curve.label or 'it'} goes from {show(finite[0], unit)} to {show(finite[-1], unit)}, "
                f"lowest {show(min(finite), unit)}, highest {show(max(finite), unit)}"
            )
    return "; ".join(parts)


def chart(panel: Panel, curves: Sequence[Curve], spans: Sequence[Span], marks: Sequence[Mark] = ()) -> str:
    """The chart as HTML. spans: what it shows of each axis; the reader picks the axis."""
    unit = panel.unit
    scale = scale_for((value for curve in curves for value in curve.series.values), panel.log)
    grid = "".join(f"M0 {round(HEIGHT * (1 - scale.place(tick)))}h{WIDTH}" for tick in scale.ticks())
    drawn = "".join(draw(curves, marks, scale, span, panel.points) for span in spans)
    thinned = "means, and the extremes behind them" if any(curve.means for curve in curves) else ""
    note = ", ".join(filter(None, (panel.note, "log scale" if scale.log else "", thinned)))
    kind = " ".join(filter(None, ("chart", panel.wide and "wide", panel.points and "points")))
    return (
        f'<figure class="{kind}"><figcaption><h3>{escape(panel.title)}</h3>'
        f'<span class="note">{escape(note)}</span></figcaption>{legend(curves, unit)}'
        f'<div class="plot" tabindex="0" role="img" aria-label="{escape(summary(panel.title, curves, unit))}">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" aria-hidden="true">'
        f'<path class="grid" d="{grid}"/>{drawn}</svg>{draw_axes(scale, unit, spans)}<span class="at"></span></div>'
        f'{complaint(curves)}<script type="application/json">{data_of(curves, spans, unit)}</script></figure>'
    )


def data_of(curves: Sequence[Curve], spans: Sequence[Span], unit: str) -> str:
    """What the script needs to tell the values under the cursor: numbers, and no text of a file."""
    content = {
        "unit": unit,
        "spans": {span.axis: [span.first, span.last] for span in spans},
        "curves": [
            {
                "steps": list(curve.series.steps),
                "tokens": list(curve.series.tokens),
                "values": [float(f"{value:.6g}") if math.isfinite(value) else None for value in curve.series.values],
            }
            for curve in curves
        ],
    }
    return json.dumps(content, separators=(",", ":"))
