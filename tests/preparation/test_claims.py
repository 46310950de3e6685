"""Processes share parts of work by a folder: each part is done by one living process, those of dead ones are free."""

import os
import signal
import threading
from collections import Counter

import pytest

from common.errors import UserError
from preparation.claims import Claims, SharedBatches, WorkIsOver


PARTS = [f"part-{number}" for number in range(40)]


def own(claims: Claims, parts=PARTS) -> list[str]:
    return [part for part, is_mine in claims.take(parts) if is_mine]


@pytest.fixture
def elsewhere(tmp_path):
    """The claims of a process on another machine that has claimed three parts and shows no more life."""
    claims = Claims(tmp_path)
    claims.me = tmp_path / "elsewhere-1-00000000"
    with claims:
        assert own(claims, PARTS[:3]) == PARTS[:3]
        yield claims


def test_each_part_is_claimed_once_by_processes_at_the_same_time(tmp_path):
    taken, start = [], threading.Barrier(4)

    def work():
        with Claims(tmp_path) as claims:
            start.wait()
            taken.extend(own(claims))
            start.wait()  # parts of a process that has left are free

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(taken) == Counter(PARTS)


def test_parts_of_a_killed_process_of_this_machine_are_free_at_once(tmp_path):
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        with Claims(tmp_path) as claims:
            own(claims, PARTS[:10])
            os.write(writing, b"x")
            signal.pause()
    os.read(reading, 1)
    with Claims(tmp_path) as claims:
        assert own(claims) == PARTS[10:]
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert own(claims, PARTS[:10]) == PARTS[:10]
        with Claims(tmp_path) as other:
            assert own(other) == []


def test_a_process_of_another_machine_is_dead_after_the_time_out_of_the_file_server(tmp_path, elsewhere):
    with Claims(tmp_path, timeout=60) as claims:
        now = claims.me.stat().st_mtime
        os.utime(elsewhere.me, (now, now - 50))
        assert own(claims, PARTS[:5]) == PARTS[3:5]
        assert claims.is_elsewhere(PARTS[0]) and not claims.is_elsewhere(PARTS[3])
        os.utime(elsewhere.me, (now, now - 70))
        assert own(claims, PARTS[:4]) == PARTS[:4]  # the last was its own before


def test_a_dead_process_has_one_successor(tmp_path, elsewhere):
    os.utime(elsewhere.me, (0, 0))
    with Claims(tmp_path) as one, Claims(tmp_path) as other:
        first, second = one.take(PARTS[:3]), other.take(PARTS[:3])
        steps = [next(first) for _ in range(3)] + [next(second) for _ in range(3)]
        assert not any(is_mine for _, is_mine in steps)
        taken = [(next(first), next(second, None)), (next(first, None), next(second, None))]
        parts = [step[0] for pair in taken for step in pair if step]
        assert sorted(parts) == PARTS[:3]


def test_a_claim_without_a_name_is_free_after_the_time_out(tmp_path):
    (tmp_path / f"{PARTS[0]}.0").touch()  # of a process that was killed between two system calls
    with Claims(tmp_path) as claims:
        assert own(claims, PARTS[:1]) == []
        os.utime(tmp_path / f"{PARTS[0]}.0", (0, 0))
        assert own(claims, PARTS[:1]) == PARTS[:1]


def test_claims_end_when_another_process_removes_them(tmp_path):
    with Claims(tmp_path / "claims") as claims:
        parts = claims.take(PARTS)
        next(parts)
        for file in (tmp_path / "claims").iterdir():
            file.unlink()
        (tmp_path / "claims").rmdir()
        with pytest.raises(WorkIsOver):
            next(parts)


def test_a_claim_that_cannot_be_written_is_an_error_for_the_user(tmp_path):
    with Claims(tmp_path) as claims, pytest.raises(UserError, match=r"cannot be written .*run again"):
        own(claims, ["x" * 300])


def shared(claims: Claims, done: set[str]) -> SharedBatches:
    parts = {"one": [["a", "b"], ["c"]], "two": [["d"]], "three": [["e", "f"]]}
    return SharedBatches(claims, parts, lambda batches: [batch for batch in batches if not done.issuperset(batch)])


def test_batches_of_a_dead_process_are_repeated_unless_it_has_written_them(tmp_path):
    done: set[str] = set()
    with Claims(tmp_path) as claims:
        batches = shared(claims, done)
        with Claims(tmp_path) as other:
            begun = shared(other, done).take()
            assert [next(begun), next(begun)] == [["a", "b"], ["c"]]
            done.update("ab")
            assert list(batches.take()) == [["d"], ["e", "f"]]
            assert batches.num_elsewhere == 3
            done.update("def")
            assert not batches.are_done()
        assert list(batches.take()) == [["c"]]
        assert (batches.num_elsewhere, len(batches)) == (0, 1)
        done.add("c")
        assert batches.are_done() and len(batches) == 0
