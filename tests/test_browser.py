"""The report in a headless Chromium: no errors, no overflow on phone and desktop, keyboard, hover and dark mode."""

import json
import re
import shutil
import subprocess

import pytest
from test_report import make_findings

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None, reason="needs Chromium: install it to check the report in a browser"
    ),
]

# Collects what goes wrong from the start, and looks at the page once it is loaded.
LISTEN = """<script>
window.wrong = [];
addEventListener("error", (event) => wrong.push(String(event.message || event.target.outerHTML)), true);
addEventListener("unhandledrejection", (event) => wrong.push(String(event.reason)));
console.error = (...words) => wrong.push(words.join(" "));
</script>"""
LOOK = """<script>
addEventListener("load", () => {
  const page = document.documentElement, passage = document.querySelector(".passage");
  const detail = passage.nextElementSibling, said = {};
  passage.focus();
  const press = (key) => passage.dispatchEvent(new KeyboardEvent("keydown", { key, cancelable: true }));
  for (const key of ["ArrowRight", "ArrowRight", "End", "Home", "ArrowLeft", "Escape"]) {
    press(key);
    (said[key] ||= []).push(detail.textContent);
  }
  passage.children[3].dispatchEvent(new MouseEvent("mouseover", { bubbles: true }));
  said.hover = detail.textContent;
  passage.blur();
  said.blur = detail.textContent;
  const wide = [...document.querySelectorAll("main *")].filter((element) =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll"));
  page.dataset.seen = JSON.stringify({
    wrong, said, width: innerWidth, scroll: page.scrollWidth,
    wide: wide.slice(0, 3).map((element) => element.outerHTML.slice(0, 120)),
    page: getComputedStyle(document.body).backgroundColor, ink: getComputedStyle(document.body).color,
    tokens: passage.children.length, pictures: document.querySelectorAll("figure svg, figure img").length,
    empty: [...document.images].filter((image) => !image.naturalWidth).length,
  });
});
</script>"""


def browse(folder, *options):
    """Open the page and return what it saw of itself."""
    command = [
        CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-extensions", f"--user-data-dir={folder / 'profile'}", "--virtual-time-budget=4000", *options,
    ]  # fmt: skip
    done = subprocess.run(
        [*command, "--dump-dom", (folder / "frame.html").as_uri()],
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    found = re.search(r'data-outcome="([^"]*)"', done.stdout)
    assert found, done.stderr[-2000:]
    return json.loads(
        found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    )


@pytest.fixture(scope="module")
def page():
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from offramp.evaluation.report import render_report

    return render_report(make_findings())


def look_at(page, folder, width, *options):
    """Lay the page out at a width: in a frame, since a browser's window has a least width of its own."""
    probed = page.replace("<head>", "<head>" + LISTEN, 1).replace("</body>", LOOK + "</body>", 1)
    (folder / "page.html").write_text(probed, encoding="utf-8")
    (folder / "frame.html").write_text(
        f'<!doctype html><iframe src="page.html" style="border:0;width:{width}px;height:3000px"></iframe>'
        '<script>addEventListener("load", () => document.documentElement.dataset.outcome = '
        "document.querySelector('iframe').contentDocument.documentElement.dataset.seen)</script>",
        encoding="utf-8",
    )
    return browse(folder, "--allow-file-access-from-files", "--window-size=1500,3000", *options)


@pytest.mark.parametrize("width", [390, 1440])
def test_the_report_works_in_a_browser(page, tmp_path, width):
    seen = look_at(page, tmp_path, width)
    assert seen["wrong"] == []
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["wide"] == []
    assert seen["pictures"] == 8
    assert seen["empty"] == 0
    said = seen["said"]
    first, second = said["ArrowRight"]
    assert first
    assert second
    assert first != second
    assert said["Home"] == said["ArrowLeft"] == [first]
    assert said["End"][0] not in (first, second, "")
    assert "after 18:" in said["hover"]
    assert said["Escape"] == [""]
    assert said["blur"] == ""


def test_dark_mode_is_dark(page, tmp_path):
    light, dark = look_at(page, tmp_path, 390), look_at(page, tmp_path, 390, "--force-dark-mode")
    page_shine, ink_shine = (
        [sum(map(int, re.findall(r"\d+", seen[name])[:3])) for seen in (light, dark)]
        for name in ("page", "ink")
    )
    assert page_shine[0] > 700 > 200 > page_shine[1]
    assert ink_shine[0] < 200 < 500 < ink_shine[1]


def test_a_page_that_overflows_or_fails_is_noticed(page, tmp_path):
    broken = page.replace("<main>", '<main><div style="width:2000px">x</div><script>nothing()</script>', 1)
    seen = look_at(broken, tmp_path, 390)
    assert seen["scroll"] > 390
    assert any("nothing" in words for words in seen["wrong"])
