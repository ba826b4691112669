"""What a run folder tells in words: how the run stands, what to look at, what the model guessed, how it was set up."""

import json
import math
import shlex
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from typing import Any

from mlm_dist import schema
from mlm_dist.charts import show
from mlm_dist.history import History, seconds_of_training
from mlm_dist.panels import COLOURS
from mlm_dist.redaction import redact_text
from mlm_dist.world import EXIT_CONFIG_ERROR, EXIT_HANG, EXIT_NON_FINITE, EXIT_STOPPED

ALERTS_AT_MOST = 200
SENTENCES_AT_MOST = 40
STEPS_AT_MOST = 4  # of one run's guesses beside each other
GUESSES_AT_MOST = 5
MASK = "[MASK]"
SIGNS = {" ": "␣", "\n": "⏎", "\t": "⇥"}
ALWAYS_FINITE = {"loss", "valid/loss", "grad_norm"}  # in a sound run; others may have had nothing to measure

EXITS = {
    EXIT_CONFIG_ERROR: "refused: configuration, input or a checkpoint",
    EXIT_STOPPED: "stopped at a checkpoint; started again, it goes on",
    EXIT_NON_FINITE: "too many steps in a row with gradients that are not finite",
    EXIT_HANG: "no step for engine.timeout_seconds",
}


# ---- words


def at(time: float) -> str:
    return f"{datetime.fromtimestamp(time, UTC):%Y-%m-%d %H:%M}"


def length(seconds: float) -> str:
    """`2 d 3 h`, `3 h 04 min`, `4 min 05 s`."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours} h {minute:02d} min" if hours else f"{minute} min {second:02d} s"


def key(run: int, histories: Sequence[History]) -> str:
    """The run's colour and name; nothing where there is one run."""
    if len(histories) == 1:
        return ""
    return f'<i class="key c{run % COLOURS} s{run // COLOURS}"></i>{escape(histories[run].name)}'


def table(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table of cells that are HTML already; the first of a row is its head. It scrolls by itself where it is wide."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in rest)}</tr>' for first, *rest in rows
    )
    top = f"<thead><tr>{top}</tr></thead>" if head else ""
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{top}<tbody>{body}</tbody></table></div>'


# ---- how the run stands


def state_of(history: History) -> tuple[str, str]:
    """(status, what it means)."""
    status, code = str(history.status.get("status", "unknown")), history.status.get("exit_code")
    means = EXITS.get(code, f"exit code {code}" if code else "") if isinstance(code, int) else ""
    if status == "running" and history.times:
        means = f"last line {at(history.times[1])} UTC"
    return status, means


def steps_of(history: History) -> tuple[str, str]:
    total = history.status.get("total_steps")
    if not isinstance(total, int):
        return f"{history.step:,}", ""
    return f"{history.step:,}", f"of {total:,}"


def tokens_of(history: History) -> tuple[str, str]:
    if history.tokens < 1e9:
        return f"{history.tokens:,}", ""
    size, letter = (1e12, "T") if history.tokens >= 1e12 else (1e9, "B")
    return f"{history.tokens / size:.4g} {letter}", f"{history.tokens:,}"


def last_of(name: str, unit: str = "") -> Callable[[History], tuple[str, str]]:
    """A fact: the last value of a metric, and the lowest where that is another one."""

    def fact(history: History) -> tuple[str, str]:
        series = history.series.get(name)
        last, lowest = (series.last(), series.lowest()) if series else (None, None)
        if last is None or lowest is None:
            return "", ""
        return show(last, unit), f"lowest {show(lowest[0], unit)} at step {lowest[1]:,}" if lowest[0] < last else ""

    return fact


def speed_of(history: History) -> tuple[str, str]:
    values = {}
    for name in ("tokens_per_second", "mfu"):
        finite = (
            [value for value in history.series[name].values if math.isfinite(value)] if name in history.series else []
        )
        values[name] = statistics.median(finite) if finite else None
    if values["tokens_per_second"] is None:
        return "", ""
    mfu = f", {show(values['mfu'], 'share')} of peak" if values["mfu"] is not None else ""
    return f"{values['tokens_per_second']:,.0f}", f"median{mfu}"


def duration_of(history: History) -> tuple[str, str]:
    seconds = seconds_of_training(history)
    if seconds is None or history.times is None:
        return "", ""
    first, last = map(at, history.times)
    same_day = first[:10] == last[:10]
    return length(seconds), f"in steps; {first} to {last[11:] if same_day else last} UTC"


def ranks_of(history: History) -> tuple[str, str]:
    ranks = history.environment.get("ranks")
    return (str(ranks), str(history.environment.get("device", ""))) if isinstance(ranks, int) else ("", "")


# (what is told, how): each gives the fact and a note to it; empty where the run folder doesn't tell
HEAD: tuple[tuple[str, Callable[[History], tuple[str, str]]], ...] = (
    ("Status", state_of),
    ("Steps", steps_of),
    ("Tokens", tokens_of),
    ("Held-out loss", last_of("valid/loss")),
    ("Training loss", last_of("loss")),
    ("Tokens per second", speed_of),
    ("Time", duration_of),
    ("Ranks", ranks_of),
)


def head(histories: Sequence[History]) -> str:
    """The facts that one wants first: tiles for one run, a table for several."""
    rows = {label: [fact(history) for history in histories] for label, fact in HEAD}
    rows = {label: facts for label, facts in rows.items() if any(text for text, _ in facts)}
    if len(histories) == 1:
        tiles = "".join(
            f'<div class="fact {escape(text) if label == "Status" else ""}"><dt>{label}</dt><dd>{escape(text)}'
            f"<small>{escape(note)}</small></dd></div>"
            for label, [(text, note)] in rows.items()
        )
        return f'<dl class="facts">{tiles}</dl>'
    return table(
        ["", *(key(run, histories) for run in range(len(histories)))],
        (
            [label, *(f"{escape(text) or '-'}<small>{escape(note)}</small>" for text, note in facts)]
            for label, facts in rows.items()
        ),
        "runs",
    )


# ---- what to look at


def warnings_of(history: History) -> list[str]:
    """What one should know before trusting the curves."""
    texts = []
    status, means = state_of(history)
    if status == "failed":
        texts.append(f"the run failed{f': {means}' if means else ''}")
    for name in sorted(ALWAYS_FINITE & history.series.keys()):
        steps = history.series[name].not_finite()
        if steps:
            places = f"step {steps[0]:,}" if len(steps) == 1 else f"{len(steps):,} steps, the first {steps[0]:,}"
            texts.append(f"{name} was not finite at {places}")
    skipped, bad = (
        history.series[name].last() if name in history.series else 0 for name in ("skipped_steps", "bad_shards")
    )
    if skipped:
        texts.append(f"{skipped:,.0f} steps were skipped, for gradients that were not finite on some rank")
    if bad:
        texts.append(f"{bad:,.0f} shards were skipped: their documents were not trained on")
    if history.unreadable:
        texts.append(f"{history.unreadable:,} lines of metrics.jsonl can't be read and are left out")
    if history.series and not any(name.startswith("valid/") for name in history.series):
        texts.append("nothing was evaluated on held-out text")
    return texts


def watch(histories: Sequence[History]) -> str:
    """What follows from the numbers, and the alerts of the runs, the newest first. Empty without any."""
    items = [
        f"<li>{key(run, histories)} {escape(text)}</li>"
        for run, history in enumerate(histories)
        for text in warnings_of(history)
    ]
    alerts = sorted(
        ((run, alert) for run, history in enumerate(histories) for alert in history.alerts),
        key=lambda pair: time_of(pair[1]),
        reverse=True,
    )
    told = [f"<li>{alert_line(alert, key(run, histories))}</li>" for run, alert in alerts[:ALERTS_AT_MOST]]
    if len(alerts) > ALERTS_AT_MOST:
        told.append(f"<li>and {len(alerts) - ALERTS_AT_MOST:,} older ones</li>")
    return "".join(
        f'<ul class="{kind}">{"".join(lines)}</ul>' for kind, lines in (("warnings", items), ("alerts", told)) if lines
    )


def alert_line(alert: Mapping[str, Any], run: str) -> str:
    """An alert as HTML: what it is, then where and when."""
    level, title, text, step = (str(alert.get(name, "")) for name in ("level", "title", "text", "step"))
    where = ", ".join(filter(None, (run, f"step {escape(step)}", f"{at(time_of(alert))} UTC")))
    return (
        f'<b class="level {escape(level.lower())}">{escape(level)}</b> <b>{escape(title)}</b> {escape(text)}'
        f"<small>{where}</small>"
    )


def time_of(alert: Mapping[str, Any]) -> float:
    time = alert.get("time")
    return float(time) if isinstance(time, int | float) and 0 <= time < 1e11 else 0.0


# ---- what the model guessed


def guesses(histories: Sequence[History]) -> str:
    """The sentences of predictions.jsonl, each mask's truth beside what the model put there. Empty without any."""
    by_text: dict[str, list[tuple[int, Mapping[str, Any]]]] = {}
    for run, history in enumerate(histories):
        for record in history.predictions:
            by_text.setdefault(record["text"], []).append((run, record))
    if not by_text:
        return ""
    scores = [f"<li>{key(run, histories)} {score(history)}</li>" for run, history in enumerate(histories)]
    cards = [sentence_card(text, records, histories) for text, records in list(by_text.items())[:SENTENCES_AT_MOST]]
    left = len(by_text) - len(cards)
    more = f"<p>and {left:,} more sentences in predictions.jsonl</p>" if left else ""
    return f'<ul class="scores">{"".join(scores)}</ul><div class="sentences">{"".join(cards)}</div>{more}'


def score(history: History) -> str:
    """How many first guesses were right, at the first step and at the last."""
    right: dict[int, list[bool]] = {}
    for record in history.predictions:
        right.setdefault(record["step"], []).extend(is_right(mask) for mask in record["masks"])
    ends = sorted(right)[:1] + sorted(right)[1:][-1:]
    counts = (f"{sum(right[step])} of {len(right[step])} at step {step:,}" for step in ends)
    return f"first guess right: {', '.join(counts)}" if ends else "no predictions"


def is_right(mask: Mapping[str, Any]) -> bool:
    return bool(mask["guesses"]) and mask["guesses"][0][0] == mask["truth"]


def sentence_card(text: str, records: Sequence[tuple[int, Mapping[str, Any]]], histories: Sequence[History]) -> str:
    """One sentence: a row for each mask; columns for some steps of one run, the last first, or the last of each run."""
    if len(histories) == 1:
        places = {round(i * (len(records) - 1) / (STEPS_AT_MOST - 1)) for i in range(STEPS_AT_MOST)}
        shown = [records[place] for place in sorted(places, reverse=True)]
    else:
        shown = list(dict(records).items())
    masks = shown[0][1]["masks"]
    head = ["truth", *(f"{key(run, histories)} step {record['step']:,}" for run, record in shown)]
    rows = (
        [visible(mask["truth"]), *(guess_cell(record["masks"], place) for _, record in shown)]
        for place, mask in enumerate(masks)
    )
    truths = [f"<mark>{visible(mask['truth'].strip(' '))}</mark>" for mask in masks]
    parts = [escape(part) for part in text.split(MASK)]
    if len(parts) == len(truths) + 1:
        parts = [piece for pair in zip(parts, [*truths, ""], strict=True) for piece in pair]
    return f'<article class="sentence"><p>{"".join(parts)}</p>{table(head, rows, "guesses")}</article>'


def guess_cell(masks: Sequence[Mapping[str, Any]], place: int) -> str:
    """The first guess, right or not, and those after it; the truth is underlined."""
    if place >= len(masks) or not masks[place]["guesses"]:
        return "-"
    texts = []
    for text, share in masks[place]["guesses"][:GUESSES_AT_MOST]:
        word = f"<u>{visible(text)}</u>" if text == masks[place]["truth"] else visible(text)
        texts.append(word if share is None else f"{word} {100 * share:.0f} %")
    tick = '<b class="right">✓</b> ' if is_right(masks[place]) else ""
    return f"{tick}<b>{texts[0]}</b><small>{' · '.join(texts[1:])}</small>"


def visible(text: str) -> str:
    """A token as HTML, with signs for white space: one that begins a word is another than the same within a word."""
    return "".join(f"<i>{SIGNS[sign]}</i>" if sign in SIGNS else escape(sign) for sign in text)


# ---- how it was set up


def setup(histories: Sequence[History]) -> str:
    """The configuration, all of one run or what differs between several, and what the runs ran on."""
    if len(histories) == 1:
        return f"{environment(histories)}<h3>Configuration</h3>{configuration(histories[0])}"
    return f"<h3>Configuration</h3>{differences(histories)}{environment(histories)}"


def configuration(history: History) -> str:
    """The resolved configuration, a key a line."""
    lines = [f"{name} = {as_text(value)}" for name, value in history.config.items()]
    return f"<pre>{escape(chr(10).join(lines))}</pre>" if lines else "<p>config.yaml can't be read.</p>"


def differences(histories: Sequence[History]) -> str:
    """The keys that differ between runs."""
    rows = []
    for name in dict.fromkeys(name for history in histories for name in history.config):
        values = [as_text(history.config[name]) if name in history.config else "-" for history in histories]
        if len(set(values)) > 1:
            rows.append([f"<code>{escape(text)}</code>" for text in (name, *values)])
    head = ["keys that differ", *(key(run, histories) for run in range(len(histories)))]
    return table(head, rows, "differing") if rows else "<p>No key differs.</p>"


def as_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def environment(histories: Sequence[History]) -> str:
    """Versions, platform, commit and command; of several runs beside each other."""
    flat = [described(history.environment) for history in histories]
    names = dict.fromkeys(name for facts in flat for name in facts)
    rows = [[escape(name), *(f"<code>{escape(facts.get(name, '-'))}</code>" for facts in flat)] for name in names]
    head = ["", *(key(run, histories) for run in range(len(histories)))] if len(histories) > 1 else []
    content = table(head, rows, "environment") if rows else "<p>environment.json can't be read.</p>"
    return f"<h3>Environment</h3>{content}"


def described(content: Mapping[str, Any]) -> dict[str, str]:
    """environment.json, flat: versions by their names, the command as it was typed, without secrets."""
    flat = {name.removeprefix("versions."): str(value) for name, value in schema.flatten(content).items()}
    command = content.get("command")
    if isinstance(command, list):
        flat["command"] = shlex.join(redact_text(str(argument)) for argument in command)
    return flat
