"""Look at a page as a browser shows it: Debian's chromium, headless, with the page in a frame of a phone's width.

The frame is how a page can be narrower than the 500 pixels below which chromium's own window doesn't go; and the page
itself is left as it is, its policy in force.
"""

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium isn't installed (apt-get install chromium)")

FRAME = """<!doctype html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;width:{width}px;height:{height}px" src="{page}"></iframe><pre id="found"></pre>
<script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", () => {{
  const page = frame.contentDocument, view = frame.contentWindow;
  let found;
  try {{ found = (() => {{ {script} }})(); }} catch (error) {{ found = {{ error: String(error) }}; }}
  document.getElementById("found").textContent = JSON.stringify(found);
}});
</script>
"""


class Seen(NamedTuple):
    found: Any  # what the script returned
    console: list[str]  # what the browser complained of


def look(page: Path, script: str, width: int, height: int = 900, *, picture: Path | None = None) -> Seen:
    """Open a page, run a script beside it that sees it as `page` and `view` and returns what it found."""
    frame = page.with_name(f"frame-{width}.html")
    frame.write_text(FRAME.format(width=width, height=height, page=page.as_uri(), script=script), encoding="utf-8")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
        "--enable-logging=stderr", f"--window-size={width},{height}", f"--user-data-dir={page.parent / 'chromium'}",
        "--virtual-time-budget=5000", *([f"--screenshot={picture}"] if picture else []), "--dump-dom", frame.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    found = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found and found[1], done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return Seen(json.loads(unescape(found[1])), console)
