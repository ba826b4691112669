"""Which metrics of which runs stand in which chart, under which section; those that no chart knows come last."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from html import escape

from mlm_dist.charts import Curve, Mark, Panel, Span, chart, show
from mlm_dist.history import History, average, since, thin

COLOURS, STYLES = 8, 4  # that report.css has
CURVES_AT_MOST = 8  # of one run in one chart
STRETCHES = 250  # of a series: more can't be seen
LATE_AT_LEAST = 16  # values in the last half: with fewer it isn't drawn by itself
MARKS_AT_MOST = 100  # of a run
STRETCHES_IN_ALL = 1200  # over the runs, so that the page of many long ones stays small


def arrange(names: Sequence[str]) -> Iterator[tuple[Panel, list[tuple[str, str]]]]:
    """The charts that a page needs, in order, each with its (metric, label) pairs. Every name is in exactly one."""
    left = dict.fromkeys(names)
    for panel in PANELS:
        chosen = [(name, label) for name in left if (label := panel.label(name)) is not None]
        patterns = list(panel.metrics)
        chosen.sort(key=lambda pair: next(i for i, pattern in enumerate(patterns) if fnmatchcase(pair[0], pattern)))
        for name, _ in chosen:
            del left[name]
        for start in range(0, len(chosen), CURVES_AT_MOST):
            yield panel, chosen[start : start + CURVES_AT_MOST]
    for name in left:
        yield Panel(OTHERS, name, {name: ""}, log=True), [(name, "")]


def colour_of(run: int, curve: int, runs: int) -> tuple[int, int]:
    """(colour, style): a colour for each run where there are several, for each curve where there is one."""
    return (curve % COLOURS, 0) if runs == 1 else (run % COLOURS, (curve + run // COLOURS) % STYLES)


def curves_of(histories: Sequence[History], chosen: Sequence[tuple[str, str]]) -> list[Curve]:
    """The curves of a chart, thinned."""
    stretches = max(20, min(STRETCHES, STRETCHES_IN_ALL // len(histories)))
    curves = []
    for place, (name, label) in enumerate(chosen):
        for run, history in enumerate(histories):
            if name in history.series:
                series = history.series[name]
                title = ", ".join(filter(None, (history.name, label))) if len(histories) > 1 else label
                colour, style = colour_of(run, place, len(histories))
                thinned, means = thin(series, stretches), average(series, stretches)
                curves.append(Curve(title, colour, style, thinned, means, series.not_finite()))
    return curves


def constant(histories: Sequence[History], name: str) -> float | None:
    """The value that a metric has throughout, in all the runs that have it; None where it moves."""
    series = [history.series[name] for history in histories if name in history.series]
    values = {value for one in series for value in one.values}
    return values.pop() if len(values) == 1 and all(len(one.values) > 1 for one in series) else None


def sections(histories: Sequence[History]) -> dict[str, str]:
    """Section -> its charts as HTML. What never moves is told in one line below them."""
    names = sorted({name for history in histories for name in history.series})
    marks = list(marks_of(histories))
    charts: dict[str, list[str]] = {}
    still: dict[str, list[str]] = {}
    for panel, chosen in arrange(names):
        values = [constant(histories, name) for name, _ in chosen]
        if None in values:
            drawn = [chart(panel, curves_of(histories, chosen), whole(histories), marks)]
            if panel.late:
                drawn.extend(last_half(panel, histories, chosen, marks))
            charts.setdefault(panel.section, []).extend(drawn)
        else:
            for (_, label), value in zip(chosen, values, strict=True):
                name = ", ".join(filter(None, (panel.title, label)))
                still.setdefault(panel.section, []).append(f"<li>{escape(name)} <b>{show(value, panel.unit)}</b></li>")
    return {
        section: f'<div class="charts">{"".join(charts.get(section, []))}</div>'
        f'<ul class="still" aria-label="unchanged">{"".join(still.get(section, []))}</ul>'
        for section in SECTIONS
        if section in charts or section in still
    }


def whole(histories: Sequence[History]) -> list[Span]:
    """Both axes from the beginning to where the longest run stands: all charts share them."""
    ends = {"steps": max(history.step for history in histories), "tokens": max(history.tokens for history in histories)}
    return [Span(axis, 0, max(1, end)) for axis, end in ends.items()]


def last_half(
    panel: Panel, histories: Sequence[History], chosen: Sequence[tuple[str, str]], marks: Sequence[Mark]
) -> Iterator[str]:
    """A chart again, of the steps from the middle on; nothing where hardly anything lies there."""
    steps, tokens = whole(histories)
    middle = steps.last // 2
    late = [
        replace(
            history, series={name: since(history.series[name], middle) for name, _ in chosen if name in history.series}
        )
        for history in histories
    ]
    late = [replace(h, series={name: series for name, series in h.series.items() if series.steps}) for h in late]
    lengths = [len(series.steps) for history in late for series in history.series.values()]
    if max(lengths, default=0) >= LATE_AT_LEAST:
        first = min(series.tokens[0] for history in late for series in history.series.values())
        spans = [replace(steps, first=middle), replace(tokens, first=min(first, tokens.last - 1))]
        yield chart(replace(panel, title=f"{panel.title}, the last half"), curves_of(late, chosen), spans, marks)


def marks_of(histories: Sequence[History]) -> Iterator[Mark]:
    """Where a warning or worse was given: in the run's colour where there are several runs."""
    for run, history in enumerate(histories):
        logged = history.series.get("loss")
        for alert in history.alerts[-MARKS_AT_MOST:]:
            step = alert.get("step")
            if logged and isinstance(step, int) and 0 <= step <= history.step and alert.get("level") != "INFO":
                place = min(bisect_left(logged.steps, step), len(logged.steps) - 1)
                yield Mark(run % COLOURS if len(histories) > 1 else -1, step, logged.tokens[place])


OTHERS = "Other numbers"
SECTIONS = ("Loss", "Optimizer", "Speed", "Data", "Memory", OTHERS)

# A metric stands in the first chart that knows its name.
PANELS = (
    Panel(
        "Loss", "Loss", {"loss": "training", "valid/loss": "held-out"}, wide=True, late=True,
        note="nats per target",
    ),
    Panel("Loss", "Perplexity", {"perplexity": "training", "valid/perplexity": "held-out"}, log=True),
    Panel(
        "Loss", "Accuracy", {"accuracy": "training", "valid/accuracy": "held-out"}, "share",
        note="of the targets, first guess",
    ),
    Panel("Loss", "Bits per byte", {"valid/bits_per_byte": "held-out"}, note="of the text that the targets stand for"),
    Panel("Loss", "Held-out loss by source", {"valid/*/loss": "*"}, note="nats per target"),
    Panel("Loss", "Held-out accuracy by source", {"valid/*/accuracy": "*"}, "share"),
    Panel("Loss", "Held-out bits per byte by source", {"valid/*/bits_per_byte": "*"}),
    Panel("Loss", "Held-out perplexity by source", {"valid/*/perplexity": "*"}, log=True),
    Panel("Optimizer", "Learning rate", {"lr": ""}),
    Panel("Optimizer", "Rows of a step", {"global_rows": ""}, note="all ranks"),
    Panel("Optimizer", "Gradient norm", {"grad_norm": ""}, note="before clipping", log=True),
    Panel("Optimizer", "Loss scale", {"loss_scale": ""}, note="fp16", log=True),
    Panel("Optimizer", "Skipped steps", {"skipped_steps": ""}, note="in all, for gradients that are not finite"),
    Panel("Speed", "Tokens per second", {"tokens_per_second": ""}, note="all ranks, without padding"),
    Panel("Speed", "FLOPs utilisation", {"mfu": ""}, "share", note="of the device's matrix-product peak"),
    Panel(
        "Speed", "Time of a step", {"step_seconds": "slowest rank", "time/*": "*"}, "seconds",
        note="parts: mean over the ranks",
    ),
    Panel("Speed", "Waiting for data", {"data_wait": ""}, "share", note="of the time, slowest rank"),
    Panel("Speed", "Which rank waits longest", {"data_wait_rank": ""}, points=True),
    Panel("Speed", "The slowest rank's lag", {"slowest_rank_lag": ""}, "share", note="behind the median, of a step"),
    Panel("Speed", "Which rank is slowest", {"slowest_rank": ""}, points=True),
    Panel(
        "Speed", "Saving a checkpoint",
        {"checkpoint/stall_seconds": "training stood still", "checkpoint/seconds": "until complete"}, "seconds",
    ),
    Panel("Speed", "Size of a checkpoint", {"checkpoint/megabytes": ""}, "megabytes"),
    Panel("Data", "Mask rate", {"mask_rate": ""}, "share", note="of the tokens that may be masked"),
    Panel(
        "Data", "What stands in a target's place",
        {"by_mask": "mask token", "by_random": "random token", "kept": "itself"}, "share",
    ),
    Panel("Data", "Packing", {"packing": ""}, "share", note="of the positions hold a token"),
    Panel("Data", "Tokens by source", {"source/*/tokens": "*"}, "share"),
    Panel("Data", "Epochs read", {"epoch": "all", "source/*/epoch": "*"}),
    Panel("Data", "Rows by source", {"source/*": "*"}, "share"),
    Panel("Data", "Length of a document", {"document_tokens": ""}, note="tokens"),
    Panel("Data", "Pieces that continue a document", {"continued_pieces": ""}, "share"),
    Panel("Data", "Unknown tokens", {"unknown_tokens": ""}, "share"),
    Panel("Data", "Bad shards", {"bad_shards": "in all", "bad_shards/*": "*"}, note="skipped so far"),
    Panel(
        "Data", "Held-out rows",
        {
            "valid/mask_rate": "mask rate", "valid/by_mask": "mask token", "valid/by_random": "random token",
            "valid/kept": "itself", "valid/packing": "packing", "valid/continued_pieces": "continued pieces",
            "valid/unknown_tokens": "unknown tokens",
        }, "share",
    ),
    Panel("Data", "Held-out targets", {"valid/targets": "all", "valid/*/targets": "*"}),
    Panel("Data", "Length of a held-out document", {"valid/document_tokens": ""}, note="tokens"),
    Panel("Memory", "Memory", {"memory_gb": ""}, "gigabytes", note="at most, of the rank with the most"),
)  # fmt: skip
