"""The page in a real browser: no script error, no request, no sideways scrolling from phone to desktop width, tooltips and tabs work."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest

from laconic.page import render

sys.path.insert(0, str(Path(__file__).parents[1] / "flow"))
from test_report import GENERATIONS, write_run

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(BROWSER is None, reason="chromium is not installed")

QUIET = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync", "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=4000")  # fmt: skip

# the report stands in a frame of the asked width, because a headless window is never as narrow as a phone
PROBE = """<!doctype html><iframe id=f style="width:%(width)dpx;height:3000px;border:0" srcdoc="%(page)s"></iframe>
<pre id=found></pre><script>
document.getElementById("f").addEventListener("load",function(){
var w=this.contentWindow,d=w.document,root=d.documentElement,
out={errors:w.errors,width:root.scrollWidth,window:w.innerWidth,wide:[]};
function boxed(e){for(;e&&e!==d.body;e=e.parentElement){var o=w.getComputedStyle(e).overflowX;
if(o==="auto"||o==="hidden")return true}return false}
d.querySelectorAll("body *").forEach(function(e){var r=e.getBoundingClientRect();
if(r.width&&r.right>w.innerWidth+1&&!boxed(e))
out.wide.push(e.tagName+"."+e.getAttribute("class"))});
function hover(e,x,y){e.dispatchEvent(new w.PointerEvent("pointermove",{bubbles:true,clientX:x,clientY:y}));
return d.getElementById("tip").textContent}
var box=d.querySelector(".tab1 [data-heat]"),
heat=JSON.parse(box.getAttribute("data-heat")),s=box.querySelector("svg"),r=s.getBoundingClientRect();
out.cell=hover(s,r.left+heat.x[1]+heat.w*0.5,r.top+heat.y+heat.h*0.5);
var bar=d.querySelector("[data-tip]");out.tip=hover(bar,5,5);
function shown(k){return w.getComputedStyle(d.querySelector(".panels.tab"+k)).display}
out.before=[shown(1),shown(2)];d.querySelector("label[for=tab2]").click();out.after=[shown(1),shown(2)];
out.dark=w.getComputedStyle(d.body).backgroundColor;out.requests=w.performance.getEntriesByType("resource").length;
document.getElementById("found").textContent=JSON.stringify(out)})</script>"""


def probe(tmp_path: Path, width: int, *flags: str, layers: int = 8) -> dict[str, Any]:
    """What the page says of itself at `width` pixels."""
    out = write_run(tmp_path / "out", layers=layers)
    page = render(out, generations=GENERATIONS).read_text(encoding="utf-8")
    page = page.replace("<head>", "<head><script>window.errors=[];window.onerror=function(m){window.errors.push(m)}</script>", 1)
    frame = tmp_path / "frame.html"
    frame.write_text(PROBE % {"width": width, "page": escape(page)}, encoding="utf-8")
    command = [
        str(BROWSER),
        *QUIET,
        *flags,
        f"--user-data-dir={tmp_path / 'profile'}",
        f"--window-size={width + 40},3000",
        "--dump-dom",
        frame.as_uri(),
    ]
    dumped = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True).stdout
    found = re.search(r'<pre id="found">(.*?)</pre>', dumped, re.DOTALL)
    assert found is not None
    assert found[1], "the page did not load"
    return dict(json.loads(unescape(found[1])))


@pytest.mark.parametrize("width", [320, 390, 700, 820, 1280])
def test_no_width_scrolls_sideways(tmp_path: Path, width: int) -> None:
    found = probe(tmp_path, width)
    assert found["errors"] == []
    assert found["requests"] == 0
    assert found["window"] == width
    assert found["width"] <= width
    assert found["wide"] == []


def test_tooltips_and_tabs_work(tmp_path: Path) -> None:
    found = probe(tmp_path, 1280)
    assert found["cell"].startswith("layer 0, q\nquantize.round.gptq, 2b g64\ndamage ")
    assert "predicted: " in found["tip"]
    assert found["before"] == ["flex", "none"]
    assert found["after"] == ["none", "flex"]


def test_many_layers_fit_a_phone(tmp_path: Path) -> None:
    found = probe(tmp_path, 390, layers=48)
    assert found["errors"] == []
    assert found["width"] <= 390
    assert found["wide"] == []


def test_dark_is_dark(tmp_path: Path) -> None:
    assert probe(tmp_path, 390, "--blink-settings=preferredColorScheme=0")["dark"] == "rgb(19, 21, 23)"
    assert probe(tmp_path, 390, "--blink-settings=preferredColorScheme=1")["dark"] == "rgb(251, 250, 247)"
