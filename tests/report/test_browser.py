"""The page in a real browser: curves are drawn, read, zoomed and hidden; nothing is wider than a telephone."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from loopwright.report import write
from recorded import line, made

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

ACT = """
const point = (node, kind, share) => {
  const box = node.getBoundingClientRect(), x = box.left + 58 + share * (box.width - 72);
  const where = { clientX: x, clientY: box.top + 60, pointerId: 1, bubbles: true, cancelable: true };
  node.dispatchEvent(new PointerEvent(kind, where));
};
const said = {};
const svg = document.querySelector(".chart svg"), tip = document.getElementById("tip");
const texts = (more = "") => [...svg.querySelectorAll("text" + more)].map((one) => one.textContent);
const labels = () => texts("[y='" + (svg.clientHeight - 8) + "']");
const curves = () => svg.querySelectorAll("path.curve").length;
const [reset, log] = document.querySelectorAll(".chart figcaption button");
said.charts = document.querySelectorAll(".chart").length;
said.titles = [...document.querySelectorAll(".chart h3")].map((one) => one.textContent);
said.curves = curves();
said.whole = labels();
said.reset = [reset.hidden];
point(svg, "pointermove", 0.5);
said.tip = [getComputedStyle(tip).display, tip.textContent];
point(svg, "pointerdown", 0.25); point(svg, "pointermove", 0.5); point(svg, "pointerup", 0.5);
said.zoomed = labels();
said.reset.push(reset.hidden);
said.other = document.querySelectorAll(".chart svg")[1].querySelectorAll("text").length > 0;
svg.dispatchEvent(new MouseEvent("dblclick", { bubbles: true }));
said.again = labels();
const at = svg.getBoundingClientRect().left + 200;
svg.dispatchEvent(new WheelEvent("wheel", { deltaY: -100, ctrlKey: true, clientX: at, cancelable: true }));
said.wheel = !reset.hidden;
reset.click();
svg.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight" }));
said.key = tip.textContent;
log.click();
said.log = [log.getAttribute("aria-pressed"), curves(), texts()];
document.querySelector(".legend button").click();
said.hidden = curves();
said.wide = document.documentElement.scrollWidth - innerWidth;
said.width = innerWidth;
document.body.dataset.said = JSON.stringify(said);
"""


def seen(page: str, folder: Path, width: int) -> dict[str, Any]:
    """What the page says of itself in the browser, after a visit to it."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)  # it would refuse what follows
    act = f"window.onerror = (text) => {{ document.body.dataset.said = JSON.stringify({{ error: text }}); }};\n{ACT}"
    file = folder / "visited.html"
    file.write_text(page.replace("</body>", f"<script>setTimeout(() => {{ {act} }}, 200)</script></body>"))
    command = [
        str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}",
        f"--window-size={width},1500", "--virtual-time-budget=3000", "--dump-dom", file.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    found = re.search(r'data-said="(.*?)"', done.stdout)
    assert found, done.stderr[-2000:]
    said: dict[str, Any] = json.loads(html.unescape(found[1]))
    assert "error" not in said, said
    return said


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium")
@pytest.mark.parametrize("width", [500, 1280])
def test_curves_are_drawn_read_and_zoomed(tmp_path, width):
    log = "".join(line(step, **{"train/loss": 100.0 / step, "lr": 0.1}) for step in range(1, 1001))
    log += "".join(line(step, "valid", **{"valid/loss": 200.0 / step}) for step in range(100, 1001, 100))
    folder = made(tmp_path / "a", log, name="x" * 3000, command=["y" * 3000])
    said = seen(write(folder).read_text(encoding="utf-8"), tmp_path, width)
    assert said["titles"] == ["loss", "lr"]
    assert said["curves"] == 2
    assert said["reset"] == [True, False]
    assert said["tip"] == ["block", "step 500valid/loss0.4000train/loss0.2000"]
    steps = [int(one.replace(",", "").removeprefix("step ")) for one in said["zoomed"]]
    assert 240 <= min(steps) < max(steps) <= 510
    assert said["again"] == said["whole"] != said["zoomed"]
    assert said["wheel"]
    assert said["key"] == "step 525valid/loss at 5000.4000train/loss0.1905"
    assert said["log"][:2] == ["true", 2]
    assert {"1", "10", "100"} <= set(said["log"][2])
    assert said["hidden"] == 1
    assert said["wide"] <= 0
