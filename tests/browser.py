"""Pages as Chromium shows them, in the dark, on a telephone and on a screen."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--enable-logging=stderr"]
MEASURE = """
<iframe src="{name}" width="400" height="900"></iframe>
<iframe src="{name}" width="1280" height="900"></iframe>
<script>
onload = () => document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(frame => {{
  const body = frame.contentDocument.body, style = getComputedStyle(body), root = frame.contentDocument.documentElement;
  return [root.scrollWidth - root.clientWidth, style.backgroundColor, style.color];
}}));
</script>
"""


def check_page(page: Path) -> None:
    """Asserts that the page needs no scrolling sideways at 400 and 1280 pixels, is dark, and makes nothing complain."""
    frame = page.with_name("frame.html")
    frame.write_text(MEASURE.format(name=page.name))
    line = ["chromium", *OPTIONS, f"--user-data-dir={page.parent}/profile", "--window-size=1800,1000"]
    dark = ["--blink-settings=preferredColorScheme=0", "--dump-dom", f"file://{frame}"]
    shown = subprocess.run([*line, *dark], capture_output=True, text=True, timeout=60)
    assert ":CONSOLE" not in shown.stderr
    found = json.loads(re.search(r"<title>(.*)</title>", shown.stdout)[1])
    assert found == [[0, "rgb(20, 20, 20)", "rgb(228, 228, 228)"]] * 2
