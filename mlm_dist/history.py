"""A run folder read back, while the run goes on too: its metrics as series, and what its other files tell of it."""

import json
import math
from array import array
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mlm_dist import schema
from mlm_dist.redaction import redact
from mlm_dist.schema import ConfigError

PLACE = {"step", "tokens", "time"}  # of a line; all else in it are metrics
LARGEST = 1e100  # what lies beyond is no number of a run, and would break the arithmetic of drawing


class Series(NamedTuple):
    """One metric at the steps where it was logged; NaN where it was not finite."""

    steps: array
    tokens: array
    values: array

    def last(self) -> float | None:
        """The last finite value."""
        return next((value for value in reversed(self.values) if math.isfinite(value)), None)

    def lowest(self) -> tuple[float, int] | None:
        """The lowest finite value and its step."""
        return min(
            ((value, step) for value, step in zip(self.values, self.steps, strict=True) if math.isfinite(value)),
            default=None,
        )

    def not_finite(self) -> list[int]:
        """The steps at which it was not finite."""
        return [step for value, step in zip(self.values, self.steps, strict=True) if not math.isfinite(value)]


@dataclass
class History:
    """What a run folder tells."""

    name: str
    folder: Path
    series: dict[str, Series] = field(default_factory=dict)
    step: int = 0
    tokens: int = 0
    times: tuple[float, float] | None = None  # of the first line and of the last
    unreadable: int = 0  # lines of metrics.jsonl that were left out
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)  # flat, without secrets
    predictions: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)


def read(folder: Path) -> History:
    """Read a run folder. Raises ConfigError where there is none, or where no training has begun in it."""
    if not folder.is_dir():
        wrong = "is no folder" if folder.exists() else "doesn't exist"
        raise ConfigError(f"{folder} {wrong}; give the folder of a run, its run.dir")
    if not (folder / "metrics.jsonl").is_file():
        raise ConfigError(f"{folder} has no metrics.jsonl; give the folder of a run that has begun to train")
    history = History(folder.resolve().name, folder)
    read_metrics(history)
    history.status = read_json(folder / "status.json")
    history.environment = read_json(folder / "environment.json")
    history.config = read_config(folder / "config.yaml")
    history.predictions = [record for record in read_lines(folder / "predictions.jsonl") if is_prediction(record)]
    history.alerts = [record for record in read_lines(folder / "alerts.jsonl") if record]
    return history


def read_metrics(history: History) -> None:
    """Take in metrics.jsonl: every number of every line, whatever its name is."""
    seen: dict[str, Series] = {}
    for record in read_lines(history.folder / "metrics.jsonl"):
        numbers = {name: number for name, value in (record or {}).items() if (number := as_number(value)) is not None}
        if not all(abs(numbers.get(name, math.nan)) < 1 << 62 for name in PLACE):
            history.unreadable += 1
            continue
        step, tokens, time = int(numbers["step"]), int(numbers["tokens"]), numbers["time"]
        history.step, history.tokens = max(history.step, step), max(history.tokens, tokens)
        history.times = (history.times or (time, time))[0], time
        for name in numbers.keys() - PLACE:
            series = seen.setdefault(name, Series(array("q"), array("q"), array("d")))
            series.steps.append(step)
            series.tokens.append(tokens)
            series.values.append(numbers[name])
    history.series = {name: in_order(series) for name, series in sorted(seen.items())}


def in_order(series: Series) -> Series:
    """The series by step: what is measured beside training may be logged after later steps."""
    order = sorted(range(len(series.steps)), key=series.steps.__getitem__)
    return Series(*(array(column.typecode, (column[place] for place in order)) for column in series))


def read_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The objects of a file of JSON lines; None for a line that can't be read: a killed run may leave half a one."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            yield record if isinstance(record, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    """The object of a JSON file; empty where it isn't there or is cut off."""
    try:
        content = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration, flat and without secrets; empty where it can't be read."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError):
        return {}
    return redact(schema.flatten(content)) if isinstance(content, dict) else {}


def as_number(value: Any) -> float | None:
    """A number that was logged, NaN where it isn't finite (null stands for those); None for what is no number."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if abs(value) <= LARGEST else math.nan


def is_prediction(record: dict[str, Any] | None) -> bool:
    """Whether a line of predictions.jsonl has all that is shown of it."""
    match record:
        case {"step": int(), "text": str(), "masks": list(masks)}:
            return all(is_guessed(mask) for mask in masks)
    return False


def is_guessed(mask: Any) -> bool:
    match mask:
        case {"truth": str(), "guesses": list(guesses)}:
            return all(is_guess(guess) for guess in guesses)
    return False


def is_guess(guess: Any) -> bool:
    match guess:
        case [str(), share]:
            return as_number(share) is not None
    return False


def thin(series: Series, stretches: int) -> Series:
    """At most three places of each stretch of a long series: the lowest, the highest, the first that isn't finite.

    So no spike is lost, however many lines fall on one pixel. Both ends of the whole are kept.
    """
    values, count = series.values, len(series.values)
    if count <= 2 * stretches:
        return series
    kept, length = {0, count - 1}, -(-count // stretches)
    for start in range(0, count, length):
        places = range(start, min(start + length, count))
        finite = [place for place in places if math.isfinite(values[place])]
        if finite:
            kept |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
        if len(finite) < len(places):
            kept.add(next(place for place in places if not math.isfinite(values[place])))
    order = sorted(kept)
    return Series(*(array(column.typecode, (column[place] for place in order)) for column in series))


def average(series: Series, stretches: int) -> Series | None:
    """The mean of each stretch that `thin` takes, at its middle; None for a series that it leaves whole."""
    values, count = series.values, len(series.values)
    if count <= 2 * stretches:
        return None
    means = Series(array("q"), array("q"), array("d"))
    length = -(-count // stretches)
    for start in range(0, count, length):
        end = min(start + length, count)
        finite = [value for value in values[start:end] if math.isfinite(value)]
        means.steps.append(series.steps[(start + end) // 2])
        means.tokens.append(series.tokens[(start + end) // 2])
        means.values.append(math.fsum(finite) / len(finite) if finite else math.nan)
    return means


def since(series: Series, step: int) -> Series:
    """What of a series lies at a step or beyond it."""
    start = bisect_left(series.steps, step)
    return Series(*(column[start:] for column in series))


def seconds_of_training(history: History) -> float | None:
    """What the steps took, over all launches, without what lies between them; None where no step was timed."""
    series = history.series.get("step_seconds")
    if series is None:
        return None
    before = [0, *series.steps]
    return sum(
        value * (step - start)
        for value, step, start in zip(series.values, series.steps, before, strict=False)
        if math.isfinite(value)
    )


def name_apart(histories: Sequence[History]) -> None:
    """Name runs by as much of the ends of their paths as tells them apart."""
    paths = [history.folder.resolve().parts for history in histories]
    for depth in range(1, 1 + max(map(len, paths))):
        names = ["/".join(parts[-depth:]) for parts in paths]
        if len(set(names)) == len(names):
            break
    for history, name in zip(histories, names, strict=True):
        history.name = name
