"""Can every page be read in a real browser: on a phone and a screen, light and dark, on paper? Headless Chromium."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from browser import CHECKS, PHONE, SCREEN, Browser, faults
from reports import plan_summary, run_summary, small_matrix

from edgeft.reporting.pages import to_html

pytestmark = pytest.mark.browser

PAGES = ("plan", "over", "run", "matrix")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A page of every kind that edgeft writes; `over`: a plan whose later stages need another machine."""
    return {
        "plan": to_html(plan_summary()),
        "over": to_html(plan_summary(profile="rtx4060-8gb", device="raspberrypi5-8gb")),
        "run": to_html(run_summary()),
        "matrix": to_html(small_matrix(tmp_path_factory.mktemp("models"))),
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [PHONE, SCREEN])
@pytest.mark.parametrize("name", PAGES)
def test_a_page_can_be_read(
    chromium: Browser, pages: dict[str, str], name: str, width: int, scheme: str, tmp_path: Path
) -> None:
    """Nothing wider than the window, no text below 9 pixels, contrast by WCAG of 4.5 to 1."""
    assert faults(chromium, pages[name], tmp_path, width, scheme) == []


BODY = "<!doctype html><html lang=en><meta name=viewport content='width=device-width'><body>{}</body></html>"
HINT = "<p class='hint'>more</p>"
PLANTED = {
    "a box wider than the window": ("overflow", "<div style='width:2000px;height:9px'></div>"),
    "a table without a way to scroll": ("overflow", "<table><tr><td style='min-width:1500px'>x</td></tr></table>"),
    "a scroll area that does not show it": (
        "no cue", "<div tabindex=0 style='overflow-x:auto;width:200px'><p style='width:900px'>far</p></div>",
    ),
    "one that keys do not reach": (
        "no cue", f"{HINT}<div style='overflow-x:auto;width:200px'><p style='width:900px'>far</p></div>",
    ),
    "a caption that is cut": (
        "cut", f"{HINT}<div tabindex=0 style='overflow-x:auto'><table style='width:1900px'><caption>long</table></div>",
    ),
    "a column whose words fall apart": (
        "squeezed", "<table><tr><td style='overflow-wrap:anywhere;max-width:14px'>merged</td><td>x</td></tr></table>",
    ),
    "text behind an edge": ("cut", "<div style='overflow:hidden;width:40px;white-space:nowrap'>cut off here</div>"),
    "small text": ("small", "<p style='font-size:8px'>tiny</p>"),
    "small text of a picture": (
        "small", "<svg viewBox='0 0 800 80' width=200 height=20><text x=9 y=40 font-size=14>shrunk</text></svg>",
    ),
    "grey on white": ("contrast", "<p style='color:#999'>pale</p>"),
    "half transparent": ("contrast", "<p style='color:rgba(0,0,0,.4)'>pale</p>"),
    "white on one stripe of two": (
        "contrast",
        "<p style='color:#fff;background:repeating-linear-gradient(90deg,#000 0 5px,#ccc 5px 9px)'>on a hatch</p>",
    ),
    "pale text of a picture on its shape": (
        "contrast",
        "<svg width=90 height=30><rect width=90 height=30 fill='#fff'/><text x=5 y=20 fill='#bbb'>pale</text></svg>",
    ),
    "text on a box that lies under it": (
        "contrast",
        "<div style='position:relative'><b style='position:absolute;inset:0;height:30px;background:#333'></b>"
        "<span style='position:relative;color:#222'>dark on dark</span></div>",
    ),
}  # fmt: skip
SOUND = (
    f"<p>plain</p>{HINT}<div tabindex=0 style='overflow-x:auto'><p style='width:1900px;font-size:13px'>far</p></div>"
    "<svg width=90 height=30><rect width=90 height=30 fill='#0072b2'/><text x=5 y=20 fill='#fff'>ok</text></svg>"
)


@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_seen(chromium: Browser, fault: str, tmp_path: Path) -> None:
    kind, planted = PLANTED[fault]
    found = faults(chromium, BODY.format(planted), tmp_path)
    assert kind in {each["kind"] for each in found}, found


def test_a_page_that_is_dark_and_writes_black_is_seen(chromium: Browser, tmp_path: Path) -> None:
    page = BODY.format("<style>:root{color-scheme:light dark}</style><p style='color:#000'>black</p>")
    assert faults(chromium, page, tmp_path) == []
    assert [each["kind"] for each in faults(chromium, page, tmp_path, scheme="dark")] == ["contrast"]


def test_what_is_sound_is_no_fault(chromium: Browser, tmp_path: Path) -> None:
    assert faults(chromium, BODY.format(SOUND), tmp_path, PHONE) == []


@pytest.mark.parametrize("name", PAGES)
def test_a_fault_planted_into_a_real_page_is_seen(
    chromium: Browser, pages: dict[str, str], name: str, tmp_path: Path
) -> None:
    page = pages[name].replace("</footer>", "<div style='width:1300px;font-size:8px;color:#aaa'>planted</div></footer>")
    kinds = {each["kind"] for each in faults(chromium, page, tmp_path) if "planted" in each["where"]}
    assert {"overflow", "small", "contrast"} <= kinds


@pytest.mark.parametrize("name", PAGES)
def test_a_page_asks_for_nothing_and_says_nothing(
    chromium: Browser, pages: dict[str, str], name: str, tmp_path: Path
) -> None:
    chromium.requests.clear()
    chromium.said.clear()
    faults(chromium, pages[name], tmp_path)
    assert [address for address in chromium.requests if not address.startswith("file:")] == []
    assert len(chromium.requests) == 1 and chromium.said == []


@pytest.mark.parametrize("name", PAGES)
def test_a_page_prints_on_a4_in_light_colours(
    chromium: Browser, pages: dict[str, str], name: str, tmp_path: Path
) -> None:
    """On paper nothing is dark, nothing lies beyond the edge, and the sheet is A4, lying for a matrix."""
    faults(chromium, pages[name], tmp_path, scheme="dark")
    boxes = re.findall(rb"/MediaBox \[0 0 ([\d.]+) ([\d.]+)\]", chromium.pdf())
    wanted = (842, 595) if name == "matrix" else (595, 842)
    assert boxes and all(tuple(round(float(side)) for side in box) == wanted for box in boxes)
    chromium.media("dark", "print")
    chromium.size(round((wanted[0] - 79.4) * 96 / 72), 900)  # what 14 mm of margin on both sides leave
    ground = chromium.evaluate("getComputedStyle(document.body).backgroundColor")
    assert ground == "rgb(255, 255, 255)"
    found: list[dict[str, Any]] = chromium.evaluate(CHECKS)
    assert [each for each in found if each["kind"] in ("overflow", "cut", "no cue")] == []


def test_the_verdict_is_on_the_first_screen(chromium: Browser, pages: dict[str, str], tmp_path: Path) -> None:
    for name, said in (("plan", "FITS"), ("over", "FITS, EXPORT ELSEWHERE"), ("run", "TRAINED AND PROVEN")):
        faults(chromium, pages[name], tmp_path)
        chromium.size(SCREEN, 900)
        assert said in chromium.evaluate("document.querySelector('.card .verdict').textContent")
        assert chromium.evaluate("document.querySelector('.card').getBoundingClientRect().bottom") < 900


def test_the_matrix_keeps_its_head_and_its_first_column(
    chromium: Browser, pages: dict[str, str], tmp_path: Path
) -> None:
    """Scrolled to the far corner, the model's name and the machine's are where they were; it begins on screen one."""
    faults(chromium, pages["matrix"], tmp_path, PHONE)
    moved = """(() => {
      const box = document.querySelector('.grid');
      box.style.maxHeight = '120px';
      box.scrollTo(9999, 9999);
      const cell = box.querySelector('tbody tr:last-child th'), head = box.querySelector('thead th:last-child');
      const [b, c, h] = [box, cell, head].map((node) => node.getBoundingClientRect());
      return [Math.round(c.left - b.left), Math.round(h.top - b.top), box.scrollLeft, box.scrollTop];
    })()"""
    left, top, across, down = chromium.evaluate(moved)
    assert left <= 2 and top <= 2 and across > 100 and down > 50
    chromium.size(SCREEN, 900)
    assert chromium.evaluate("document.querySelector('.grid').getBoundingClientRect().top") < 900
