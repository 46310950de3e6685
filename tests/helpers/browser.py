"""Look at a page in a real browser: headless Chromium, driven by Playwright."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright


# Waits until a video plays by itself; a page that allows no script has Playwright's other ways to wait refused.
PLAYS = (
    "video => new Promise(resolve => video.addEventListener('timeupdate', () => video.currentTime > 0 && resolve()))"
)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@dataclass
class Visit:
    """A page that is open, and what it did."""

    page: Page
    errors: list[str] = field(default_factory=list)  # on the console, or of scripts
    requests: list[str] = field(default_factory=list)  # URLs, without what the page itself contains

    def value(self, script: str) -> object:
        """Return the value of a line of JavaScript."""
        return self.page.evaluate(script)


@contextmanager
def start_chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # for root in containers
        yield browser
        browser.close()


@contextmanager
def visit(browser: Browser, file: Path, *, width: int = 1200, scheme: str = "light") -> Iterator[Visit]:
    """Open a file in a window of a width in pixels, of a reader who prefers light or dark."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    opened = Visit(context.new_page())
    opened.page.on("console", lambda message: opened.errors.append(message.text))
    opened.page.on("pageerror", lambda error: opened.errors.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(file.as_uri())
    opened.requests[:] = [url for url in opened.requests if not url.startswith("data:")]
    yield opened
    context.close()
