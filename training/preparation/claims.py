"""Divide work among processes that share only a folder, start and die at any time, and need not know one another.

    <folder>/<process>              locked by a living process, and touched every HEARTBEAT seconds
    <folder>/<part>.<generation>    names the process that does a part; the highest generation counts

A part of a dead process is taken over by creating the claim's next generation, which only one process can do. Claims
only save work: results are written atomically and do not depend on who computes them. So it is harmless if a process
that was suspended continues a part that another one has taken over.
"""

import fcntl
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import UserError


HEARTBEAT, TIMEOUT = 10.0, 120.0  # seconds

Batches = Sequence[Sequence[str]]  # of names


class WorkIsOver(Exception):
    """Another process has finished all work and removed the claims."""


class Claims:
    """This process's claims, which count while it is in the `with` statement.

    A process is dead when it has not shown life for `timeout` seconds, on this machine as soon as its lock is free.
    Both times that are compared come from the file server, so the clocks of the machines may differ.
    """

    def __init__(self, folder: Path, timeout: float = TIMEOUT):
        self.folder, self.timeout = folder, timeout
        self.machine = _machine()
        self.me = folder / f"{self.machine}-{os.getpid()}-{secrets.token_hex(4)}"
        self._leaving = threading.Event()

    def __enter__(self) -> "Claims":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(self.me, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        with suppress(OSError):  # without locks, others go by the time
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        threading.Thread(target=self._show_life, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self.me.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _show_life(self) -> None:
        while not self._leaving.wait(HEARTBEAT):
            with suppress(OSError):  # may work the next time
                os.utime(self.me)

    def take(self, parts: Sequence[str]) -> Iterator[tuple[str, bool]]:
        """Claim parts one by one, whenever the caller asks for the next one; those of dead processes come last.

        Yields:
            A part, and whether it belongs to this process now. Another process's part comes with False, and again with
            True if that process is dead. Parts that this process had claimed earlier are its own.

        Raises:
            WorkIsOver: the claims have been removed.
        """
        claimed, mine = self._generations(), set()
        for part in parts:
            if part not in claimed and self._claim(part, 0):
                mine.add(part)
            elif part not in claimed:  # others are ahead
                claimed = self._generations()
            yield part, part in mine
        claimed, is_dead = self._generations(), {}
        for part in parts:
            if part in mine or part not in claimed:
                continue
            owner = self._owner(part, claimed[part])
            if owner not in is_dead:
                is_dead[owner] = self._is_dead(owner)
            if owner == self.me or (is_dead[owner] and self._claim(part, claimed[part] + 1)):
                yield part, True

    def is_elsewhere(self, part: str) -> bool:
        """Return whether a part belongs to another living process."""
        generation = self._generations().get(part)
        owner = self.me if generation is None else self._owner(part, generation)
        return owner != self.me and not self._is_dead(owner)

    def _generations(self) -> dict[str, int]:
        """Return the highest generation of each claimed part."""
        generations: dict[str, int] = {}
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError as error:
            raise WorkIsOver from error
        for name in names:
            part, _, generation = name.rpartition(".")
            if part and generation.isdigit():
                generations[part] = max(int(generation), generations.get(part, 0))
        return generations

    def _claim(self, part: str, generation: int) -> bool:
        path = self.folder / f"{part}.{generation}"
        try:
            with open(path, "x", encoding="utf-8") as file:
                file.write(self.me.name)
        except FileExistsError:
            return False
        except FileNotFoundError as error:
            raise WorkIsOver from error
        except OSError as error:
            raise UserError(
                f"{path} cannot be written ({error.strerror}); finished work is kept: run again"
            ) from error
        return True

    def _owner(self, part: str, generation: int) -> Path:
        """Return the file of a part's process, or the claim itself if that has not written its name yet."""
        claim = self.folder / f"{part}.{generation}"
        try:
            return self.folder / (claim.read_text(encoding="utf-8") or claim.name)
        except FileNotFoundError as error:
            raise WorkIsOver from error

    def _is_dead(self, owner: Path) -> bool:
        try:
            file = os.open(owner, os.O_RDWR)  # which also makes a network file system ask for the time again
        except FileNotFoundError:
            return True
        try:
            if owner.name.startswith(f"{self.machine}-"):
                with suppress(OSError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
            os.utime(self.me)
            return os.stat(self.me).st_mtime - os.fstat(file).st_mtime > self.timeout
        except FileNotFoundError as error:
            raise WorkIsOver from error
        finally:
            os.close(file)


def _machine() -> str:
    """Return a name of the running kernel: containers on it see one another's locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").split("-")[0]
    except OSError:
        return socket.gethostname()


class SharedBatches:
    """Batches of names, in parts that processes claim.

    Args:
        claims: of this process.
        parts: batches by the names of their parts, which are the same in all processes.
        left: returns which batches of a part have no results yet.
    """

    def __init__(self, claims: Claims, parts: Mapping[str, Batches], left: Callable[[Batches], Batches]):
        self.claims, self.parts, self.left = claims, dict(parts), left
        self.num_elsewhere = 0  # names that other processes do, as far as known, or have done

    def __len__(self) -> int:
        return sum(map(_count, self.parts.values()))

    def take(self) -> Iterator[Sequence[str]]:
        """Yield batches for this process to do, until all that are left belong to other living processes."""
        self.num_elsewhere, skipped = 0, set()
        for part, is_mine in self.claims.take(list(self.parts)):
            batches = self.parts[part]
            if not is_mine:
                skipped.add(part)
                self.num_elsewhere += _count(batches)
                continue
            left = self.left(batches)
            self.num_elsewhere += (0 if part in skipped else _count(batches)) - _count(left)
            if left:
                yield from left
            else:
                del self.parts[part]

    def are_done(self) -> bool:
        """Return whether all batches have results, whichever process has written them."""
        self.parts = {part: left for part, batches in self.parts.items() if (left := self.left(batches))}
        return not self.parts


def _count(batches: Batches) -> int:
    return sum(map(len, batches))
