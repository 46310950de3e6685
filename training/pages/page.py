"""A page of HTML that contains everything it shows: one file that opens anywhere, also without a network."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from common.files import atomic_write
from common.hub_token import without_tokens
from pages.parts import TEMPLATES


@dataclass(frozen=True)
class Section:
    """A part of a page with a heading, to which the top of the page links."""

    title: str
    parts: Sequence[str]  # HTML, as from `pages.parts` and `pages.charts`; any other text is escaped


def render_page(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """Return a page, light or dark as the reader's system is; sections without content are omitted.

    Its security policy allows no script and no request, so that nothing in a caption can act.

    Args:
        lead: what the page is about, below the title.
    """
    shown = [section for section in sections if any(section.parts)]
    return TEMPLATES.get_template("page.html").render(title=title, lead=lead, sections=shown)


def write_page(path: Path, page: str) -> None:
    """Write a page atomically and without tokens, which a command on it could contain."""
    with atomic_write(path) as partial:
        # backslashreplace: a file name need not be UTF-8
        partial.write_text(without_tokens(page), encoding="utf-8", errors="backslashreplace")
