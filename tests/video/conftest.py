from functools import cache
from pathlib import Path

import pytest

from encoded_clips import ENCODINGS, encode


@pytest.fixture(scope="session")
def clip_of(tmp_path_factory):
    """A function that returns the clip of an encoding, made at its first call."""

    @cache
    def clip_of(name: str) -> Path:
        file, options = ENCODINGS[name]
        return encode(tmp_path_factory.mktemp("clip") / file, **options)

    return clip_of
