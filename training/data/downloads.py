"""Take no more from elsewhere than was bargained for."""

from collections.abc import Iterable, Iterator
from time import monotonic


def pieces_within(pieces: Iterable[bytes], most_bytes: int, most_seconds: float) -> Iterator[bytes]:
    """Pass the pieces of a file on as they come.

    Args:
        pieces: each asked for only when the one before it has been passed on.
        most_bytes: of the file.
        most_seconds: from the first piece asked for to the last; looked at when a piece has come.

    Raises:
        ValueError: the file is larger.
        TimeoutError: it takes longer.
    """
    deadline, taken = monotonic() + most_seconds, 0
    for piece in pieces:
        taken += len(piece)
        if taken > most_bytes:
            raise ValueError(f"larger than {most_bytes / 2**20:g} MiB")
        if monotonic() > deadline:
            raise TimeoutError(f"not whole within {most_seconds:g} s")
        yield piece
