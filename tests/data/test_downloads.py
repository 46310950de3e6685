"""A download ends where it was agreed that it would."""

import pytest

from data import media_cache
from data.media_cache import pieces_within


def test_pieces_come_through_as_they_are():
    assert list(pieces_within([b"ab", b"c"], 3, 60)) == [b"ab", b"c"]


def test_what_is_larger_is_not_asked_for_to_its_end():
    def endless():
        while True:
            yield bytes(2**20)

    taken = []
    with pytest.raises(ValueError, match="larger than 3 MiB"):
        taken.extend(pieces_within(endless(), 3 * 2**20, 60))


def test_what_takes_longer_is_given_up(monkeypatch):
    monkeypatch.setattr(media_cache, "monotonic", iter((0.0, 9.0, 11.0)).__next__)
    passed = []
    with pytest.raises(TimeoutError, match="not whole within 10 s"):
        for piece in pieces_within([b"a", b"b", b"c"], 99, 10):
            passed.append(piece)
    assert passed == [b"a"]
