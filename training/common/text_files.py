"""Read text files, lines and JSON, with the place of each error."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from common.errors import UserError


def read_lines(file: Path, at_least: int = 0) -> list[str]:
    """Return stripped lines, without blank ones at the end. Only line ends split, not U+2028 and the like."""
    lines = [line.strip() for line in read_utf8(file).replace("\r\n", "\n").replace("\r", "\n").split("\n")]
    while len(lines) > at_least and not lines[-1]:
        lines.pop()
    return lines


def read_utf8(file: Path) -> str:
    """Read a text file without a byte order mark; one that cannot be read is a UserError."""
    try:
        return file.read_bytes().decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: byte {error.start} does not fit; save it as UTF-8") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error


def read_json(file: Path) -> list[tuple[str, Any]]:
    """Return (place, value) of each value of a JSON array, or of lines of JSON; an error in it names the line."""
    text = read_utf8(file)
    if text.lstrip().startswith("["):
        return [(f"{file.name}:row {number}", value) for number, value in enumerate(_parsed(text, file), 1)]
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [(f"{file.name}:{number}", _parsed(line, file, number)) for number, line in lines]


def _parsed(text: str, file: Path, first_line: int = 1) -> Any:
    advice = "it must be an array of objects, or one object a line"
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{file}:{first_line + error.lineno - 1}"
        raise UserError(f"{place} is not valid JSON: {error.msg} at character {error.colno}; {advice}") from error
    except (ValueError, RecursionError) as error:  # very long numbers, very deep nesting
        raise UserError(f"{file}:{first_line} is not valid JSON: {error}; {advice}") from error


def read_rows(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in a file of JSON lines; lines that a killed process or an editor has damaged are skipped."""
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        with suppress(ValueError):
            if isinstance(row := json.loads(line), dict):
                yield row


def index_lines(entries: Iterable[Mapping[str, Any]]) -> str:
    """Return the text of an index: one JSON object per line."""
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


def digest_lines(lines: Iterable[str]) -> str:
    """Return a short digest of lines, in their order."""
    digest, separator, lines = hashlib.sha256(), "", iter(lines)
    while some := list(islice(lines, 10_000)):  # of a million, without all of them in memory
        digest.update((separator + "\n".join(some)).encode(errors="surrogatepass"))
        separator = "\n"
    return digest.hexdigest()[:12]
