import pytest

from common.units import in_bytes


@pytest.mark.parametrize(
    ("number", "kilo", "words"),
    [
        (0, 1000, "0 kB"),
        (393_216, 1000, "393 kB"),
        (999_600, 1000, "1 MB"),
        (5_000_000, 1000, "5 MB"),
        (999_600_000, 1000, "1.00 GB"),
        (7_250_000_000_000, 1000, "7250.00 GB"),
        (3 * 2**30, 1024, "3.00 GB"),
        (512 * 2**20, 1024, "512 MB"),
    ],
)
def test_bytes_have_a_unit_in_which_they_are_not_zero(number, kilo, words):
    assert in_bytes(number, kilo) == words
