"""Batches are read, encoded and written at the same time."""

import threading
import time

import pytest

from preparation.stages import StageTimes, run_stages


PATIENCE = 30  # seconds until a stage that waits for another one fails


class Steps:
    """Batches whose reading, encoding and writing is noted."""

    def __init__(self, count: int):
        self.count, self.encoded = count, []
        self.was_read, self.was_written = ([threading.Event() for _ in range(count)] for _ in range(2))

    def read(self):
        for number in range(self.count):
            self.was_read[number].set()
            yield number

    def write(self, number: int) -> None:
        self.was_written[number].set()


def test_the_encoder_never_waits_for_the_others_nor_they_for_it():
    steps = Steps(8)

    def encode(number: int) -> int:
        # A slow encoder: meanwhile the next two batches are read, and the one before is written.
        for following in range(number, min(number + 3, steps.count)):
            assert steps.was_read[following].wait(PATIENCE)
        assert number == 0 or steps.was_written[number - 1].wait(PATIENCE)
        time.sleep(0.02)
        steps.encoded.append(number)
        return number

    times = run_stages(steps.read(), encode, steps.write, num_writers=1)
    assert steps.encoded == list(range(8))
    assert all(written.is_set() for written in steps.was_written)
    assert times.encoding >= 8 * 0.02


def test_the_times_name_the_stage_that_holds_up_the_others():
    def slow(number: int) -> int:
        time.sleep(0.03)
        return number

    by_reading = run_stages(map(slow, range(8)), lambda number: number, lambda _: None, num_writers=1)
    by_encoding = run_stages(iter(range(8)), slow, lambda _: None, num_writers=1)
    by_writing = run_stages(iter(range(8)), lambda number: number, slow, num_writers=1)
    assert by_reading.reading > by_reading.encoding + by_reading.writing
    assert by_encoding.encoding > by_encoding.reading + by_encoding.writing
    assert by_writing.writing > by_writing.reading + by_writing.encoding
    said = str(StageTimes(reading=1.26, encoding=61, writing=0))
    assert said == "1.3 s waiting for decoding, 61.0 s encoding, 0.0 s waiting for writing"


def test_few_batches_are_in_memory():
    steps = Steps(12)
    begun = [threading.Event() for _ in range(steps.count)]

    def encode(number: int) -> int:
        begun[number].set()
        assert not any(read.is_set() for read in steps.was_read[number + 3 :])
        return number

    def write(number: int) -> None:
        for following in range(number, min(number + 3, steps.count)):
            assert begun[following].wait(PATIENCE)
        assert not any(one.is_set() for one in begun[number + 3 :])

    run_stages(steps.read(), encode, write, num_writers=1)


@pytest.mark.parametrize("stage", ["reading", "encoding", "writing"])
def test_an_error_of_any_stage_ends_all(stage):
    def fails(number: int) -> int:
        if number == 2:
            raise ValueError(stage)
        return number

    def work(name: str):
        return fails if stage == name else lambda number: number

    with pytest.raises(ValueError, match=stage):
        run_stages(map(work("reading"), range(100)), work("encoding"), work("writing"), num_writers=2)
