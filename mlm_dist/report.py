"""A run, or several over one another, as one HTML file that needs nothing else: no network, no W&B.

The page shows without its script, which adds the values under the cursor. Its policy allows that script alone, by hash.
"""

import base64
import hashlib
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from mlm_dist import history, notes, panels
from mlm_dist.manifest import replace_file
from mlm_dist.schema import ConfigError

HERE = Path(__file__).parent
FILE = "report.html"


def write(folders: Sequence[Path], out: Path) -> int:
    """Write the page of the runs in the folders; returns its size. Raises ConfigError with one sentence."""
    runs = [history.read(folder) for folder in {folder.resolve(): folder for folder in folders}.values()]
    history.name_apart(runs)
    data = page(runs).encode("utf-8", "replace")
    try:
        replace_file(out, data)
    except OSError as error:
        raise ConfigError(f"{out} can't be written ({error.strerror}); give another --out") from error
    return len(data)


def write_at_end(folder: Path, say: Callable[[str], None]) -> None:
    """The page of a run that ends, in its folder. Whatever goes wrong is a warning: the run's work is done."""
    try:
        write([folder], folder / FILE)
    except Exception as error:
        say(f"warning: {folder / FILE} was not written: {error}")


def page(runs: Sequence[history.History]) -> str:
    """The page as text."""
    title = " and ".join(run.name for run in runs) if len(runs) <= 3 else f"{len(runs)} runs"
    charts = panels.sections(runs)
    content = {"Alerts": notes.watch(runs), "Loss": charts.pop("Loss", ""), "Predictions": notes.guesses(runs)}
    content |= charts | {"Setup": notes.setup(runs)}
    content = {name: text for name, text in content.items() if text}
    links = "".join(f'<a href="#{anchor(name)}">{name}</a>' for name in content)
    body = "".join(f'<section id="{anchor(name)}"><h2>{name}</h2>{text}</section>' for name, text in content.items())
    if not any(run.series for run in runs):
        body = "<p>Nothing has been logged yet.</p>" + body
    style, script = ((HERE / f"report.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<input type="radio" name="axis" id="axis-steps" checked><input type="radio" name="axis" id="axis-tokens">
<header>
<h1>{escape(title)}</h1>
{notes.head(runs)}
</header>
<nav aria-label="sections">
<div class="links">{links}</div>
<div class="axis">x-axis: <label for="axis-steps">steps</label><label for="axis-tokens">tokens</label></div>
</nav>
<main>{body}</main>
<footer>Written at {datetime.now(UTC):%Y-%m-%d %H:%M} UTC by mlm_dist from \
{escape(", ".join(str(run.folder / "metrics.jsonl") for run in runs))}</footer>
<div class="unseen" aria-live="polite"></div>
<script>{script}</script>
</body>
</html>
"""


def anchor(section: str) -> str:
    return section.lower().replace(" ", "-")
