"""What pages of Markdown consist of: code, headings, tables, flags, links."""

import re


def code_blocks(page: str) -> list[str]:
    """The commands and programs of a page."""
    return re.findall(r"```(?:bash|python)\n(.*?)```", page, flags=re.DOTALL)


def marked_blocks(page: str) -> dict[str, str]:
    """The code blocks that a marker `<!-- tested: name -->` gives a name."""
    return dict(re.findall(r"<!-- tested: ([\w ]+) -->\n```(?:bash|python)\n(.*?)```", page, flags=re.DOTALL))


def without_code(page: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page, flags=re.DOTALL)


def outline(page: str) -> list[str]:
    """The levels of headings and the shapes of tables, in their order."""
    lines = without_code(page).splitlines()
    return [line.split(" ")[0] if line[0] == "#" else line for line in lines if re.match(r"#|\|-", line)]


def table_rows(page: str) -> list[list[str]]:
    """The cells of all rows of all tables, titles included."""
    lines = [line for line in without_code(page).splitlines() if re.match(r"\|[^-]", line)]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def named_flags(page: str) -> set[str]:
    """The flags of our scripts that a page names; other programs' have hyphens."""
    return set(re.findall(r"(?<![\w-])--[a-z_]\w*(?![\w-])", page))


def anchors(page: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", without_code(page), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def links(page: str) -> list[str]:
    """Where a page's links lead."""
    return re.findall(r"\]\(([^)\s]+)\)", without_code(page))
