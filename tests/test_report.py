"""The page of a run: what stands in it is what the run folder holds; and a real browser shows it."""

import json
import math
import random
import re
from array import array
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import look, needs_chromium
from hypothesis import given
from hypothesis import strategies as st
from launching import pretrain, run

from mlm_dist import charts, history, panels, report
from mlm_dist.history import Series
from mlm_dist.schema import ConfigError

HOSTILE = "<script>window.hacked=1<"
HOSTILE_IMAGE = "\"'><img src=x onerror=window.hacked=1>"


def training(step: int, **numbers: Any) -> dict[str, Any]:
    """A line of metrics as a run logs it."""
    usual = {
        "loss": 8 - step / 100, "perplexity": 2000.0 - step, "accuracy": 0.1, "lr": step * 1.2345e-7,
        "grad_norm": 1 + step % 7, "tokens_per_second": 5000.0 + step, "mfu": 0.25 + step / 1e4, "step_seconds": 2.0,
        "data_wait": 0.01 + step / 1e5, "packing": 0.98 + step / 1e5, "skipped_steps": 0,
        "mask_rate": 0.3, "by_mask": 0.8, "by_random": 0.1, "kept": 0.1,
    }  # fmt: skip
    return {"step": step, "tokens": 2048 * step, "time": 1.7e9 + 2 * step} | usual | numbers


def held_out(step: int, loss: float) -> dict[str, Any]:
    numbers = {"valid/loss": loss, "valid/perplexity": math.exp(loss), "valid/accuracy": 0.2 + step / 1e4}
    return {"step": step, "tokens": 2048 * step, "time": 1.7e9 + 2 * step} | numbers


def make_run(folder: Path, lines: list[dict[str, Any]], tail: str = "", config: str = "optim: {lr: 0.003}\n") -> Path:
    """A run folder with these lines of metrics, and something after them."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail)
    (folder / "config.yaml").write_text(config)
    status = {"status": "done", "exit_code": 0, "step": 100, "total_steps": 100}
    (folder / "status.json").write_text(json.dumps(status))
    environment = {"command": ["launch/pretrain.py", "optim.lr=3e-3"], "commit": "0123abc", "ranks": 4, "device": "cpu"}
    (folder / "environment.json").write_text(json.dumps(environment | {"versions": {"torch": "2.13.0"}}))
    return folder


def usual_run(folder: Path, **files: Any) -> Path:
    """A run of 100 steps, evaluated twice."""
    lines = [training(step) for step in range(10, 101, 10)]
    return make_run(folder, [*lines[:5], held_out(50, 7.6), *lines[5:], held_out(100, 7.1)], **files)


def written(*folders: Path) -> str:
    out = folders[0].parent / "page.html"
    report.write(folders, out)
    return out.read_text()


class Page(HTMLParser):
    """A page's elements, its charts by title, and its words."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data: list[dict[str, Any]] = []
        self.words = ""
        self.inside = ""
        self.feed(text)
        titles = re.findall(r"<figure.*?<h3>(.*?)</h3>", text)
        self.charts = dict(zip(titles, self.data, strict=True))
        self.figures = dict(zip(titles, re.findall(r"<figure.*?</figure>", text), strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = "json" if dict(attrs).get("type") == "application/json" else tag

    def handle_data(self, data: str) -> None:
        if self.inside == "json":
            self.data.append(json.loads(data))
            self.inside = ""
        elif self.inside not in ("script", "style"):
            self.words += f" {data}"


# ---- what stands in the page


def test_the_numbers_are_those_of_metrics_jsonl(tmp_path: Path) -> None:
    page = Page(written(usual_run(tmp_path / "mine")))
    training_curve, held_out_curve = page.charts["Loss"]["curves"]
    assert training_curve["steps"] == list(range(10, 101, 10))
    assert training_curve["tokens"] == [2048 * step for step in range(10, 101, 10)]
    assert training_curve["values"] == pytest.approx([8 - step / 100 for step in range(10, 101, 10)], rel=1e-5)
    assert (held_out_curve["steps"], held_out_curve["values"]) == ([50, 100], [7.6, 7.1])
    assert page.charts["Learning rate"]["curves"][0]["values"][-1] == pytest.approx(1.2345e-5)
    assert page.charts["FLOPs utilisation"]["curves"][0]["values"][0] == pytest.approx(0.251)


def test_the_head_tells_how_the_run_stands(tmp_path: Path) -> None:
    words = " ".join(Page(written(usual_run(tmp_path / "mine"))).words.split())
    for fact in (
        "Status done", "Steps 100 of 100", "Tokens 204,800", "Held-out loss 7.1", "Training loss 7",
        "Tokens per second 5,055 median, 25.55 % of peak", "Time 3 min 20 s", "Ranks 4 cpu",
        "commit 0123abc", "command launch/pretrain.py optim.lr=3e-3", "torch 2.13.0", "optim.lr = 0.003",
    ):  # fmt: skip
        assert fact in words


def test_what_never_moves_is_told_in_a_line(tmp_path: Path) -> None:
    page = Page(written(usual_run(tmp_path / "mine")))
    words = " ".join(page.words.split())
    assert "Mask rate" not in page.charts and "Mask rate 30 %" in words and "Skipped steps 0" in words


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), max_size=12, unique=True))
def test_every_metric_stands_in_one_chart(names: list[str]) -> None:
    known = ["loss", "valid/loss", "source/law", "bad_shards/missing", *(f"source/{i}" for i in range(20))]
    given_names = list(dict.fromkeys([*known, *names]))
    placed = [name for _, chosen in panels.arrange(given_names) for name, _ in chosen]
    assert sorted(placed) == sorted(given_names)


def test_metrics_that_no_chart_knows_come_last(tmp_path: Path) -> None:
    lines = [
        training(step, **{"new/thing": step / 3, "source/law/tokens": 0.5 + step / 1e3, "source/law": step})
        for step in range(1, 30)
    ]
    text = written(make_run(tmp_path / "mine", lines))
    page = Page(text)
    assert page.charts["new/thing"]["curves"][0]["values"][2] == 1.0
    assert text.index("<h2>Other numbers") < text.index("<h3>new/thing")
    assert "<span>law</span>" in page.figures["Tokens by source"] and "Rows by source" in page.charts


def test_what_is_not_finite_is_a_gap_and_marked(tmp_path: Path) -> None:
    lines = [training(step, loss=None if step in (4, 5) else 3.0 + step) for step in range(1, 10)]
    page = Page(written(make_run(tmp_path / "mine", lines)))
    assert page.charts["Loss"]["curves"][0]["values"] == [4, 5, 6, None, None, 9, 10, 11, 12]
    figure = page.figures["Loss"]
    curve = re.search(r'<path class="curve[^"]*" d="([^"]*)"', figure)
    bad = re.search(r'<path class="bad" d="([^"]*)"', figure)
    assert curve and curve[1].count("M") == 2 and bad and bad[1].count("M") == 2
    assert "not finite at steps 4, 5" in figure and "loss was not finite at 2 steps, the first 4" in page.words


def test_a_metric_that_is_never_finite_is_shown_as_such(tmp_path: Path) -> None:
    page = Page(written(make_run(tmp_path / "mine", [training(step, loss=None) for step in (1, 2)])))
    assert page.charts["Loss"]["curves"][0]["values"] == [None, None]
    assert "not finite at steps 1, 2" in page.figures["Loss"]


def test_numbers_without_measure_do_not_break_the_page(tmp_path: Path) -> None:
    odd = [0.0, 1e-300, -1e99, 1e99, math.inf, -math.inf, math.nan, 10**400, 5e-324, True, "text", [1], {"a": 1}]
    page = Page(written(make_run(tmp_path / "mine", [training(i + 1, odd=value) for i, value in enumerate(odd)])))
    assert page.charts["odd"]["curves"][0]["values"] == [0, 1e-300, -1e99, 1e99, None, None, None, None, 5e-324]


# ---- long runs


numbers = st.lists(st.floats(-1e6, 1e6) | st.just(math.nan), min_size=1, max_size=400)


def series_of(values: list[float]) -> Series:
    steps = array("q", range(1, len(values) + 1))
    return Series(steps, array("q", (7 * step for step in steps)), array("d", values))


@given(numbers, st.integers(1, 30))
def test_thinning_keeps_extremes_ends_and_gaps(values: list[float], stretches: int) -> None:
    whole = series_of(values)
    thinned = history.thin(whole, stretches)
    assert len(thinned.steps) <= max(2 * stretches, 3 * stretches + 2)
    assert (thinned.steps[0], thinned.steps[-1]) == (1, len(values)) and list(thinned.steps) == sorted(
        set(thinned.steps)
    )
    kept = {(step, repr(value)) for step, value in zip(thinned.steps, thinned.values, strict=True)}
    assert kept <= {(step, repr(value)) for step, value in zip(whole.steps, whole.values, strict=True)}
    assert all(tokens == 7 * step for step, tokens in zip(thinned.steps, thinned.tokens, strict=True))
    finite = [value for value in values if math.isfinite(value)]
    if finite:
        assert min(finite) in thinned.values and max(finite) in thinned.values
    assert any(map(math.isnan, thinned.values)) == any(map(math.isnan, values))


def test_the_mean_of_a_stretch_is_its_mean() -> None:
    assert history.average(series_of([1.0] * 4), 2) is None, "all is shown"
    means = history.average(series_of([1, 3, math.nan, 5, math.nan, math.nan]), 2)
    assert means is not None and means.values[0] == 2 and means.values[1] == 5 and list(means.steps) == [2, 5]


def test_the_page_of_a_long_run_is_small_and_keeps_its_spike(tmp_path: Path) -> None:
    luck = random.Random(1)
    lines = [training(step, loss=2 + luck.random(), grad_norm=luck.random()) for step in range(1, 20_001)]
    lines[12_344]["loss"] = 31.25
    text = written(make_run(tmp_path / "mine", lines))
    curve = Page(text).charts["Loss"]["curves"][0]
    assert curve["values"][curve["steps"].index(12_345)] == 31.25
    assert len(text) < 600_000


# ---- the file as it is found


def test_half_a_line_and_other_rubbish_are_left_out_and_told(tmp_path: Path) -> None:
    tail = '[1]\n{"tokens": 3}\n{"step": 1e300, "tokens": 1, "time": 1, "loss": 1}\n{"step": 110, "tokens": 2252'
    page = Page(written(usual_run(tmp_path / "mine", tail=tail)))
    assert page.charts["Loss"]["curves"][0]["steps"][-1] == 100
    assert "4 lines of metrics.jsonl can't be read" in page.words


def test_a_line_that_comes_late_stands_at_its_step(tmp_path: Path) -> None:
    late = {"step": 2, "tokens": 4096, "time": 1.7e9, "checkpoint/seconds": 5.0}
    soon = late | {"step": 1, "tokens": 2048, "checkpoint/seconds": 4.0}
    page = Page(written(make_run(tmp_path / "mine", [training(1), training(2), training(3), late, soon])))
    assert page.charts["Saving a checkpoint"]["curves"][0]["steps"] == [1, 2]


def test_a_run_that_logged_nothing_yet_has_a_page(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "mine", [])
    assert "Nothing has been logged yet" in written(folder)
    for name in ("status.json", "environment.json", "config.yaml"):
        (folder / name).write_text("{'")
    assert "environment.json can't be read" in written(folder)


def test_a_failed_run_says_why(tmp_path: Path) -> None:
    folder = usual_run(tmp_path / "mine")
    (folder / "status.json").write_text('{"status": "failed", "exit_code": 17, "step": 100, "total_steps": 200}')
    words = Page(written(folder)).words
    assert "the run failed: too many steps in a row with gradients that are not finite" in words


# ---- several runs


def test_several_runs_lie_over_one_another(tmp_path: Path) -> None:
    one = usual_run(tmp_path / "one", config="optim: {lr: 0.003}\nrun: {seed: 1, dir: one}\n")
    two = usual_run(tmp_path / "two", config="optim: {lr: 0.006}\nrun: {seed: 1, dir: two}\nnew: {key: x}\n")
    text = written(one, two, one)
    page = Page(text)
    assert len(page.charts["Loss"]["curves"]) == 4
    colours = re.findall(r'<li><i class="key (c\d) (s\d)"></i><span>(.*?)</span>', page.figures["Loss"])
    assert colours == [
        ("c0", "s0", "one, training"),
        ("c1", "s0", "two, training"),
        ("c0", "s1", "one, held-out"),
        ("c1", "s1", "two, held-out"),
    ]
    differing = re.search(r'<table class="differing">.*?</table>', text)
    assert differing
    assert re.findall(r'<th scope="row"><code>(.*?)</code>', differing[0]) == ["optim.lr", "run.dir", "new.key"]
    assert "0.006" in differing[0] and "seed" not in text


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    words = Page(written(usual_run(tmp_path / "a/run"), usual_run(tmp_path / "b/run"))).words
    assert "a/run" in words and "b/run" in words


# ---- other files, and what may not get through


PREDICTION = {
    "step": 50,
    "tokens": 9,
    "text": "a [MASK] of the [MASK]",
    "masks": [
        {"truth": " dose", "guesses": [["dose", 0.5], [" dose", 0.25]]},
        {"truth": "drug", "guesses": [["drug", 0.75]]},
    ],
}


def test_predictions_and_alerts_are_shown_where_they_are(tmp_path: Path) -> None:
    folder = usual_run(tmp_path / "mine")
    assert not {"Predictions", "Alerts"} & set(re.findall(r"<h2>(.*?)</h2>", written(folder)))
    later = json.loads(json.dumps(PREDICTION | {"step": 100}))
    later["masks"][0]["guesses"].reverse()
    odd = [PREDICTION | {"masks": 3}, {"text": "x"}, PREDICTION | {"masks": [{"truth": "y", "guesses": [["z"]]}]}]
    lines = [PREDICTION, later, *odd]
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 1')
    alert = {"step": 60, "time": 1.7e9, "level": "WARN", "title": "Loss spike", "text": "9.1 at step 60"}
    (folder / "alerts.jsonl").write_text(json.dumps(alert) + "\n" + json.dumps(alert | {"level": "INFO", "time": None}))
    text = written(folder)
    words = " ".join(Page(text).words.split())
    assert "first guess right: 1 of 2 at step 50, 2 of 2 at step 100" in words
    assert "a dose of the drug" in words and "✓ ␣ dose 25 % dose 50 %" in words and "dose 50 % ␣ dose 25 %" in words
    assert "WARN Loss spike 9.1 at step 60 step 60, 2023-11-14 22:13 UTC" in words
    assert Page(text).figures["Loss"].count('class="mark') == 2, "the warning, over both axes"


def hostile_run(folder: Path) -> Path:
    """Every text that a page takes from files, as bad as it can be."""
    texts = {"level": HOSTILE, "title": HOSTILE_IMAGE, "text": HOSTILE_IMAGE}
    names = {HOSTILE_IMAGE: 0.5, "</script>": 2.5, f"{HOSTILE}still": 0}  # what it is multiplied with
    lines = [training(step, **{name: step * by for name, by in names.items()}) for step in range(1, 30)]
    lines[3][HOSTILE] = lines[5][HOSTILE] = None
    lines[4][HOSTILE] = 1.0
    config = {HOSTILE: {HOSTILE_IMAGE: "</pre>" + HOSTILE, "of": f"{folder.name}{HOSTILE}"}}
    make_run(folder, lines, config=json.dumps(config))
    (folder / "status.json").write_text(json.dumps({"status": HOSTILE_IMAGE, "exit_code": 1}))
    environment = {"command": [HOSTILE, HOSTILE_IMAGE], HOSTILE: HOSTILE_IMAGE, "ranks": 1, "device": HOSTILE_IMAGE}
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "alerts.jsonl").write_text(json.dumps({"step": HOSTILE, "time": HOSTILE} | texts) + "\n")
    mask = {"truth": HOSTILE, "guesses": [[HOSTILE_IMAGE, 0.5]]}
    prediction = {"step": 1, "tokens": 1, "text": HOSTILE_IMAGE + "[MASK]" + HOSTILE, "masks": [mask]}
    (folder / "predictions.jsonl").write_text(json.dumps(prediction) + "\n")
    return folder


def test_text_of_files_is_inert(tmp_path: Path) -> None:
    folders = [hostile_run(tmp_path / HOSTILE), hostile_run(tmp_path / HOSTILE_IMAGE)]
    for given_folders in (folders[:1], folders):
        text = written(*given_folders)
        assert text.count("<script") == text.count("<figure") + 1 == text.count("</script>")
        page = Page(text)
        scripts = [attributes for tag, attributes in page.tags if tag == "script"]
        assert scripts.pop() == {} and all(script == {"type": "application/json"} for script in scripts)
        assert not {"img", "iframe", "object", "link"} & {tag for tag, _ in page.tags}
        assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]
        assert HOSTILE in page.words and HOSTILE_IMAGE in page.words


def test_secrets_are_not_shown(tmp_path: Path) -> None:
    folder = usual_run(tmp_path / "mine", config="deepspeed: {api_key: PLANTED, other: 1}\n")
    environment = {"command": ["launch/pretrain.py", "deepspeed.api_key=PLANTED", "--config", "x.yaml"]}
    (folder / "environment.json").write_text(json.dumps(environment))
    text = written(folder)
    assert "PLANTED" not in text and text.count("[redacted]") == 2 and "--config x.yaml" in text


def test_the_page_needs_nothing_else(tmp_path: Path) -> None:
    text = written(usual_run(tmp_path / "mine"))
    assert not re.search(r"""(https?:|src=|@import|url\(|<link)""", text)
    assert "default-src 'none'" in text


# ---- scales


@given(st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=5), st.booleans())
def test_a_scale_holds_its_values_and_its_ticks(values: list[float], log: bool) -> None:
    scale = charts.scale_for(values, log)
    assert all(0 <= scale.place(value) <= 1 for value in values)
    ticks = scale.ticks()
    assert (
        len(ticks) <= 9
        and ticks == sorted(set(ticks))
        and all(-1e-9 <= scale.place(tick) <= 1 + 1e-9 for tick in ticks)
    )
    labels = charts.label_ticks(ticks)
    assert len(set(labels)) == len(ticks)


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (None, "", "-"),
        (5.998244, "", "5.9982"),
        (3e-5, "", "3e-5"),
        (12345.6, "", "12,346"),
        (0.12345678, "share", "12.35 %"),
        (0.00026187, "seconds", "0.2619 ms"),
        (2.5, "seconds", "2.5 s"),
        (0, "seconds", "0 s"),
    ],
)
def test_values_have_as_many_digits_as_one_reads(value: float | None, unit: str, shown: str) -> None:
    assert charts.show(value, unit) == shown


@pytest.mark.parametrize(
    ("ticks", "unit", "labels"),
    [
        ([0, 500, 1000], "", ["0", "500", "1,000"]),
        ([0, 5000, 10_000], "", ["0", "5 k", "10 k"]),
        ([0.5e9, 1e9], "", ["0.5 B", "1 B"]),
        ([0.1, 0.15], "share", ["10 %", "15 %"]),
        ([0.30000000000000004], "seconds", ["0.3 s"]),
    ],
)
def test_ticks_are_short(ticks: list[float], unit: str, labels: list[str]) -> None:
    assert charts.label_ticks(ticks, unit) == labels


# ---- as a command, and at the end of a run


def test_refusals_are_one_sentence(tmp_path: Path) -> None:
    folder = usual_run(tmp_path / "mine")
    (tmp_path / "empty").mkdir()
    for folders, out, said in (
        ([tmp_path / "none"], tmp_path / "x.html", "none doesn't exist; give the folder of a run"),
        ([folder / "metrics.jsonl"], tmp_path / "x.html", "metrics.jsonl is no folder; give the folder of a run"),
        ([folder, tmp_path / "empty"], tmp_path / "x.html", "empty has no metrics.jsonl"),
        ([folder], tmp_path / "no/x.html", "x.html can't be written (No such file or directory); give another --out"),
        ([folder], tmp_path, "can't be written"),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            report.write(folders, out)
    assert not (tmp_path / "x.html").exists()


def test_the_command_writes_the_page_or_says_why_not(tmp_path: Path) -> None:
    folder = usual_run(tmp_path / "mine")
    done = run("launch/report.py", str(folder))
    assert done.returncode == 0 and str(folder / "report.html") in done.stdout, done.stdout
    assert (folder / "report.html").read_text().startswith("<!doctype html>")
    refused = run("launch/report.py", str(tmp_path))
    assert refused.returncode == 2 and refused.stdout.count("\n") == 1 and refused.stdout.startswith("error: ")


def test_a_page_that_can_not_be_written_is_a_warning(tmp_path: Path) -> None:
    folder, said = usual_run(tmp_path / "mine"), []
    (folder / "report.html").mkdir()
    report.write_at_end(folder, said.append)
    assert len(said) == 1 and said[0].startswith(f"warning: {folder / 'report.html'} was not written: ")
    assert not list(folder.glob("*.tmp")), "nothing is left of the attempt"


@pytest.mark.slow
def test_a_run_leaves_its_page_and_ends_well_where_it_can_not(toy: Path, tmp_path: Path) -> None:
    done = pretrain(toy, tmp_path / "run", "run.steps=3")
    assert done.returncode == 0, done.stdout
    page = Page((tmp_path / "run/report.html").read_text())
    assert page.charts["Loss"]["curves"][0]["steps"] == [1, 2, 3]
    words = " ".join(page.words.split())
    assert "Status done" in words and "Ranks 2 cpu" in words and re.search(r"commit [0-9a-f]{40}", words)
    (tmp_path / "other/report.html").mkdir(parents=True)
    other = pretrain(toy, tmp_path / "other", "run.steps=3")
    assert other.returncode == 0 and "warning: " in other.stdout and "report.html was not written" in other.stdout
    assert json.loads((tmp_path / "other/status.json").read_text())["status"] == "done"


# ---- in a browser

LOOK = """
  const shown = (element) => element.getBoundingClientRect().width > 0;
  const text = (selector) => [...page.querySelectorAll(selector)].map((element) => element.textContent);
  const plot = page.querySelector(".plot"), box = plot.getBoundingClientRect();
  const found = {
    hacked: view.hacked === 1,
    width: [page.documentElement.scrollWidth, page.documentElement.clientWidth],
    outside: [...page.querySelectorAll("main *")].filter((e) => !e.closest(".scroll, pre, svg")
      && e.getBoundingClientRect().right > view.innerWidth).map((e) => e.outerHTML.slice(0, 80)),
    charts: [...page.querySelectorAll(".chart")].map((figure) => [...figure.querySelectorAll(".curve")]
      .filter(shown).map((path) => [path.getTotalLength(), path.getBoundingClientRect().width])),
    dots: [...page.querySelectorAll(".dots")].filter(shown).length,
    height: box.height,
    before: text(".legend b"),
  };
  const at = (share) => ({ clientX: box.left + share * box.width, clientY: box.top + 5, pointerType: "mouse" });
  plot.dispatchEvent(new view.PointerEvent("pointermove", at(0.5)));
  found.at = text(".at");
  found.pointed = text(".legend b");
  plot.dispatchEvent(new view.PointerEvent("pointerleave", at(0.5)));
  found.after = text(".legend b");
  plot.dispatchEvent(new view.KeyboardEvent("keydown", { key: "End" }));
  found.end = text(".legend b");
  plot.dispatchEvent(new view.KeyboardEvent("keydown", { key: "ArrowLeft" }));
  found.typed = page.querySelector(".at").textContent;
  found.axes = [".by-steps", ".by-tokens"].map((name) => shown(page.querySelector("svg " + name + " .curve")));
  page.querySelector('label[for="axis-tokens"]').click();
  found.toggled = [".by-steps", ".by-tokens"].map((name) => shown(page.querySelector("svg " + name + " .curve")));
  plot.dispatchEvent(new view.PointerEvent("pointermove", at(0.25)));
  found.atTokens = page.querySelector(".at").textContent;
  return found;
"""


@pytest.mark.slow
@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("runs", [1, 2])
def test_a_browser_shows_it(tmp_path: Path, width: int, runs: int) -> None:
    folders = [usual_run(tmp_path / f"run-with-a-rather-long-name-{i}") for i in range(runs)]
    for folder in folders:
        (folder / "predictions.jsonl").write_text(json.dumps(PREDICTION) + "\n")
    written(*folders)
    found, console = look(tmp_path / "page.html", LOOK, width)
    assert console == [] and "error" not in found
    assert found["width"][0] <= found["width"][1] and found["outside"] == []
    assert len(found["charts"]) > 8 and found["height"] > 100
    for paths in found["charts"]:
        assert paths and all(length > 0 and extent > 50 for length, extent in paths)
    assert found["dots"] >= len(found["charts"])
    assert found["at"][0] == "step 50, 102,400 tokens" and found["before"] == found["after"]
    expected = {1: ["7.5", "7.6"], 2: ["7.5", "7.5", "7.6", "7.6"]}[runs]
    assert found["pointed"][: 2 * runs] == expected and found["before"][: 2 * runs] != expected
    assert found["end"] == found["before"], "the script writes values as the page does"
    assert found["typed"] == "step 90, 184,320 tokens"
    assert found["axes"] == [True, False] and found["toggled"] == [False, True]
    assert found["atTokens"] in ("step 20, 40,960 tokens", "step 30, 61,440 tokens")


@pytest.mark.slow
@needs_chromium
def test_hostile_text_does_nothing_in_a_browser(tmp_path: Path) -> None:
    written(hostile_run(tmp_path / HOSTILE), hostile_run(tmp_path / HOSTILE_IMAGE))
    found, console = look(tmp_path / "page.html", LOOK, 390)
    assert found["hacked"] is False and console == [] and found["width"][0] <= found["width"][1]


@pytest.mark.slow
@needs_chromium
def test_the_browser_would_tell(tmp_path: Path) -> None:
    """The checks above see what they are there for: an error, a wide page, and a script that the policy stops."""
    text = written(usual_run(tmp_path / "mine"))
    page = tmp_path / "page.html"
    page.write_text(text.replace("<main>", '<main><div style="width:600px">wide</div><script>window.hacked=1</script>'))
    found, console = look(page, LOOK, 390)
    assert found["width"][0] > found["width"][1] and found["outside"]
    assert found["hacked"] is False and any("Content Security Policy" in line for line in console)
