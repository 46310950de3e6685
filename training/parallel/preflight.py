"""Compare folder, code, flags, data and model of all ranks before any of them works.

Each rank plans its part from the files of its machine. If these differ, a run hangs because one rank has fewer
batches, or trains replicas that drift apart, and a preparation never finishes.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch.distributed import DistError, rendezvous
from torch.distributed.constants import default_pg_timeout

from common.errors import UserError, first_line
from common.files import atomic_write
from common.ranks import launch_rank, launch_size, local_rank, num_machines
from common.text_files import digest_lines
from parallel.coordinator import Coordinator


Exchange = Callable[[Any], list[Any]]  # returns the values of all ranks, in order; called on every rank

# Flags that may differ between machines: paths, whose content is compared instead or used by one rank only, ...
PLACES = ("cache_dir", "data_root", "dataset_file", "dataset_mix", "dataset_name", "validation_dataset_file")
PLACES += ("validation_images",)
# ... and the speed of the machine.
WORKERS = ("dataloader_num_workers", "num_artifact_workers", "num_decode_threads", "pin_memory")
OWN_FLAGS = {*PLACES, *WORKERS, "hub_token"}
COMPARED_PACKAGES = ("torch", "diffusers", "accelerate")


def compare_ranks(exchange: Exchange, folder: Path, facts: dict[str, str]) -> str | None:
    """Compare the ranks with rank 0; called on every rank.

    Args:
        exchange: gathers values of all ranks.
        folder: the output folder, which all machines must share.
        facts: values that must be equal, by the name for messages.

    Returns:
        The message on the first rank that differs, the same on all ranks; None if all agree.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A new name each time, because network file systems cache for a while which names do not exist.
    token = f".shared-{os.urandom(8).hex()}" if launch_rank() == 0 else None
    if token:
        for left in folder.glob(".shared-*"):  # by a killed run
            left.unlink(missing_ok=True)
        with atomic_write(folder / token):
            pass
    try:
        is_shared = (folder / exchange(token)[0]).exists()
        mine = {"host": socket.gethostname(), "folder": str(folder.absolute()), "is_shared": is_shared, "facts": facts}
        everyone = exchange(mine)
    finally:
        if token:
            (folder / token).unlink(missing_ok=True)
    return first_difference(everyone)


def first_difference(everyone: list[dict[str, Any]]) -> str | None:
    """Return the message of `compare_ranks` on the gathered values of all ranks."""
    main = everyone[0]
    for rank, other in enumerate(everyone):
        who = f"rank {rank} on {other['host']}"
        if not other["is_shared"]:
            return (
                f"--output_dir: '{other['folder']}' of {who} is not the folder of rank 0 on {main['host']}; pass a "
                "folder that all machines share (NFS, Lustre, ...)"
            )
        differing = [
            f"{name} {here}, there {there}"
            for name, there in main["facts"].items()
            if (here := other["facts"].get(name, "unknown")) != there
        ]
        if differing:
            return (
                f"{who} was not started as rank 0 on {main['host']}: {'; '.join(differing)}; start all machines with "
                "the same code, flags, model and data"
            )
    return None


def refuse(problem: str | None) -> None:
    """End every rank if there is a problem, with a message of the first rank of each machine."""
    if problem and local_rank() == 0:
        raise UserError(problem)
    if problem:
        raise SystemExit(2)


def check_training(coordinator: Coordinator, flags: Mapping[str, Any], data: Mapping[str, str], model: str) -> None:
    """Compare the ranks of a training run, or raise a UserError; called on every rank.

    Args:
        data: fingerprints of the training and held-out clips, by the name for messages.
        model: fingerprint of the model.
    """
    if coordinator.num_ranks == 1:
        return
    refuse(compare_ranks(coordinator.gather, Path(flags["output_dir"]), common_facts(flags, model) | data))


def check_preparation(flags: Mapping[str, Any], folder: Path, model: str, samples: Iterable[str]) -> None:
    """Compare the ranks of a preparation on several machines, which otherwise share only the output folder.

    Without MASTER_ADDR, as for ranks that are started one by one, nothing is compared. Ranks that differ or do not
    meet are a UserError.

    Args:
        model: fingerprint of the model.
        samples: names of the samples.
    """
    if num_machines() == 1 or not os.environ.get("MASTER_ADDR"):
        return
    with exchange_by_store() as exchange:
        problem = compare_ranks(exchange, folder, common_facts(flags, model) | {"data": digest_lines(samples)})
    refuse(problem)


def common_facts(flags: Mapping[str, Any], model: str) -> dict[str, str]:
    """Return the values to compare that do not depend on the data."""
    code = (
        path.name + path.read_text(encoding="utf-8")
        for path in sorted(Path(__file__).resolve().parents[1].rglob("*.py"))
    )
    return {
        "code": digest_lines(code),
        "model": model,
        **{package: version(package) for package in COMPARED_PACKAGES},
        **{f"--{name}": str(value) for name, value in flags.items() if name not in OWN_FLAGS},
    }


@contextmanager
def exchange_by_store(timeout: timedelta = default_pg_timeout) -> Iterator[Exchange]:
    """Let ranks without a process group exchange values over a store at the launch's MASTER_ADDR and MASTER_PORT.

    The last rank may still probe its clips: the others wait for it until the timeout, then raise a UserError.
    """
    ranks, rounds = range(launch_size()), 0
    try:
        store, _, _ = next(rendezvous("env://", launch_rank(), launch_size(), timeout=timeout))

        def exchange(value: Any) -> list[Any]:
            nonlocal rounds
            rounds += 1
            store.set(f"ranks/{rounds}/{launch_rank()}", json.dumps(value))
            return [json.loads(store.get(f"ranks/{rounds}/{rank}")) for rank in ranks]

        yield exchange
        store.set(f"ranks/left/{launch_rank()}", "")
        if launch_rank() == 0:  # may host the store, which ends with this process
            store.wait([f"ranks/left/{rank}" for rank in ranks])
    except DistError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ.get('MASTER_PORT')}"
        raise UserError(
            f"the {launch_size()} processes of this launch did not meet at {where} ({first_line(error)}); start it on "
            "every machine, and open that port in the firewall"
        ) from error
