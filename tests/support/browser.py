"""A headless Chromium that looks at pages as a person does: Debian's, driven by selenium."""

import io
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from deit_ray.cluster.surroundings import go_direct

PATIENCE_S = 60.0
WIDTH = 1400  # of pictures
# of MLflow's table of runs: a dictionary for each row, its cells by column
TABLE = """
const rows = {};
for (const row of document.querySelectorAll('.ag-row[row-index]')) {
  const cells = rows[row.getAttribute('row-index')] ??= {};
  for (const cell of row.querySelectorAll('.ag-cell')) {
    cells[cell.getAttribute('col-id')] = cell.innerText.trim().split('\\n').pop();  // before it, a colour
  }
}
return Object.keys(rows).map(Number).sort((a, b) => a - b).map(number => rows[number]);
"""
HEADERS = """
const shown = [...document.querySelectorAll('.ag-header-cell[col-id]')].filter(cell => cell.innerText.trim());
const left = cell => cell.getBoundingClientRect().left;
return shown.sort((a, b) => left(a) - left(b)).map(cell => cell.getAttribute('col-id'));
"""


class Browser:
    """A browser with one page.

    Args:
        driver: selenium's driver.
    """

    def __init__(self, driver):
        self.driver = driver

    def open(self, url: str) -> None:
        """Opens a page as in a new tab: another part of the same application is loaded again too."""
        self.driver.get("about:blank")
        self.driver.get(url)

    def close_assistant(self) -> None:
        """Closes the panel that MLflow opens beside a page at a person's first visit, and never again."""
        self.wait_for(lambda: self.find("[data-component-id='mlflow.assistant.chat_panel.close']"))[0].click()

    def run(self, script: str, *arguments):
        """What a script of JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def find(self, css: str) -> list:
        """The elements of a CSS selector."""
        return self.driver.find_elements("css selector", css)

    def text(self) -> str:
        """The text that the page shows."""
        return self.run("return document.body.innerText")

    def wait_for(self, condition: Callable, seconds: float = PATIENCE_S, pause_s: float = 0.05):
        """What a function returns once it is true.

        Raises:
            AssertionError: it does not become true; the message has the page's text.
        """
        deadline = time.monotonic() + seconds
        while not (found := condition()):
            assert time.monotonic() < deadline, f"it did not happen; the page shows:\n{self.text()[:3000]}"
            time.sleep(pause_s)
        return found

    def wait_for_text(self, *texts: str) -> None:
        self.wait_for(lambda: all(text in self.text() for text in texts))

    def table(self) -> list[dict[str, str]]:
        """The rows of MLflow's table of runs that are drawn, as text by column."""
        return self.run(TABLE)

    def columns(self) -> list[str]:
        """The columns of MLflow's table of runs, from left to right."""
        return self.run(HEADERS)

    def save(self, path: Path, height: int | None = None) -> None:
        """Saves a picture of the page as WebP, `WIDTH` pixels wide.

        Args:
            height: how much of the page, in its own pixels; by default that of the window.
        """
        picture = Image.open(io.BytesIO(self.driver.get_screenshot_as_png())).convert("RGB")
        picture = picture.crop((0, 0, picture.width, min(height or picture.height, picture.height)))
        picture.thumbnail((WIDTH, picture.height), Image.Resampling.LANCZOS)
        picture.save(path, quality=75, method=6)


@contextmanager
def chromium(width: int = 1600, height: int = 1000) -> Iterator[Browser]:
    """A Chromium with a new profile, as long as it is entered.

    Raises:
        RuntimeError: Debian's packages chromium and chromium-driver are not installed.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    places = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    if None in places.values():
        raise RuntimeError("Chromium is missing; on Debian: apt-get install chromium chromium-driver")
    go_direct()
    options = webdriver.ChromeOptions()
    options.binary_location = places["chromium"]
    for argument in (
        "--headless=new",
        "--no-sandbox",  # root has none
        "--disable-dev-shm-usage",
        "--no-proxy-server",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    driver = webdriver.Chrome(options, Service(places["chromedriver"]))
    try:
        yield Browser(driver)
    finally:
        driver.quit()
