"""Pages in headless Chromium: where it is, what a page said and asked for, and what it draws."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

DESK = {"viewport": {"width": 1200, "height": 900}, "color_scheme": "light"}
PHONE_AT_NIGHT = {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"}


def chromium():
    """Chromium's program, or why there is none."""
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed (pip install playwright)"
    )
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if shutil.which(name):
            return sync_api, shutil.which(name)
    with sync_api.sync_playwright() as driver:
        if Path(driver.chromium.executable_path).exists():
            return sync_api, driver.chromium.executable_path
    pytest.skip("no Chromium here (apt install chromium, or: playwright install chromium)")


@pytest.fixture(scope="module", name="browser")
def open_browser():
    sync_api, program = chromium()
    with sync_api.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program)
        yield opened
        opened.close()


class Visit:
    """A page in the browser, with what it said and asked for."""

    def __init__(self, browser, url, **options):
        self.page = browser.new_context(**options).new_page()
        self.said, self.asked = [], []
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda fault: self.said.append(str(fault)))
        self.page.on("dialog", lambda dialog: self.said.append(dialog.message))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(url)

    def keep(self, name, tmp_path):
        """A screenshot, in the folder that LEXIGRAFT_SCREENSHOTS names, else in the test's own."""
        folder = Path(os.environ.get("LEXIGRAFT_SCREENSHOTS", tmp_path))
        self.page.screenshot(path=folder / f"{name}.png", full_page=True)

    def ground(self):
        """The page's background: red, green, blue."""
        colour = self.page.evaluate("getComputedStyle(document.body).backgroundColor")
        return [int(part) for part in colour.strip("rgb()").split(",")]

    def search_and_sort(self, text):
        """A text is found in the table of tokens, whose rows a column's head then sorts."""
        rows = self.page.locator("#tokens tbody tr")
        everything = rows.count()
        self.page.fill("#search", text)
        assert 0 < rows.count() < everything and text in rows.first.inner_text()
        self.page.fill("#search", "")
        self.page.get_by_role("button", name="count", exact=True).click()
        cells = self.page.locator("#tokens tbody tr td:nth-child(4)").all_inner_texts()
        counts = [int(cell.replace(",", "")) for cell in cells if cell != "–"]
        assert counts == sorted(counts, reverse=True) and rows.count() == everything
        assert self.page.locator("th[aria-sort=descending]").count() == 1


_PIXELS = """([text, family]) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const pen = canvas.getContext("2d", {willReadFrequently: true});
  pen.font = `32px ${family}`;
  pen.fillText(text, 8, 44);
  return Array.from(pen.getImageData(0, 0, 64, 64).data).filter((_, place) => place % 4 === 3);
}"""
NOWHERE = "\U0010ffff"  # is no character, so no font has it: a box


def require_drawn(place, text):
    """Every character of `text`, in the fonts of the element `place`, is more than a box."""
    family = place.evaluate("one => getComputedStyle(one).fontFamily")
    box = place.page.evaluate(_PIXELS, [NOWHERE, family])
    for character in text:
        pixels = place.page.evaluate(_PIXELS, [character, family])
        if pixels == box and not _known(character):
            pytest.skip(f"no font here has {character} (apt install fonts-noto)")
        assert any(pixels) and pixels != box, character


def _known(character):
    """Whether a font of this machine has it; where nothing tells, none."""
    asked = ["fc-list", f":charset={ord(character):x}"]
    return bool(shutil.which("fc-list") and subprocess.check_output(asked))
