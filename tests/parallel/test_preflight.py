"""Ranks that do not match are detected at the start, in one line that says where and what."""

import json
import os
import socket
import subprocess
import sys

import pytest

from args import parse_prepare_args
from cli.schema import flag_values
from common.errors import UserError
from parallel import preflight as machines
from repository import TRAINING


# What a rank of a preparation does, for each launch that the test plans: prints how the comparison ended.
RANK = """
import json, os, sys
from pathlib import Path
from args import parse_prepare_args
from cli.schema import flag_values
from common.errors import UserError
from parallel.preflight import check_preparation
for launch in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = str(launch["port"])
    flags = flag_values(parse_prepare_args(launch["flags"]))
    try:
        check_preparation(flags, Path(flags["output_dir"]), launch["model"], launch["samples"])
        print("agreed", flush=True)
    except UserError as error:
        print(error, flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_ranks(launches_of_rank: list[list[dict]]) -> list[list[str]]:
    """Run the launches in one process a rank, each as if on a machine of its own; returns the lines they print."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, json.dumps(launches)],
            env=os.environ | place | {"RANK": str(rank), "PYTHONPATH": str(TRAINING)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, launches in enumerate(launches_of_rank)
    ]
    return [process.communicate()[0].splitlines() for process in ranks]


def test_ranks_on_two_machines_compare_everything_that_must_agree(tmp_path):
    for folder in ("clips", "clips, mounted elsewhere"):
        (tmp_path / folder).mkdir()

    def launch(output: str = "shared", data: str = "clips", more: tuple[str, ...] = (), **facts) -> dict:
        flags = ["--data_root", str(tmp_path / data), "--output_dir", str(tmp_path / output), *more]
        return {"flags": flags, "model": "a model", "samples": ["a", "b"], **facts}

    (tmp_path / "shared").mkdir()
    (tmp_path / "shared/.shared-of-a-run-that-was-killed").touch()
    pairs = [
        (launch(), launch()),
        # Where the data are mounted, and how many workers read them, is each machine's own matter.
        (launch(), launch("shared", "clips, mounted elsewhere", ("--dataloader_num_workers", "3"))),
        (launch(), launch("not shared")),
        (launch(), launch(samples=["a", "c"])),
        (launch(more=("--seed", "7")), launch()),
        (launch(), launch(model="another")),
    ]
    for one, other in pairs:
        one["port"] = other["port"] = free_port()
    main, other = run_ranks([list(launches) for launches in zip(*pairs, strict=True)])
    assert main[:2] == ["agreed", "agreed"]
    host = socket.gethostname()
    assert main[2] == (
        f"--output_dir: '{tmp_path}/not shared' of rank 1 on {host} is not the folder of rank 0 on {host}; pass a "
        "folder that all machines share (NFS, Lustre, ...)"
    )
    started = f"rank 1 on {host} was not started as rank 0 on {host}: "
    same = "; start all machines with the same code, flags, model and data"
    assert main[3].startswith(f"{started}data ") and main[3].endswith(same)
    assert main[4:] == [f"{started}--seed 42, there 7{same}", f"{started}model another, there a model{same}"]
    assert other == main
    assert not list((tmp_path / "shared").iterdir())


def test_the_wait_for_a_missing_rank_ends(monkeypatch):
    port = free_port()
    place = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for name, value in (place | {"MASTER_PORT": str(port)}).items():
        monkeypatch.setenv(name, value)
    with (
        pytest.raises(UserError, match=rf"the 2 processes .* did not meet at 127\.0\.0\.1:{port} .* firewall"),
        machines.exchange_by_store(machines.timedelta(milliseconds=200)),
    ):
        pass


@pytest.mark.parametrize("place", [{"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, {"LOCAL_WORLD_SIZE": "1"}])
def test_ranks_on_one_machine_or_without_an_address_do_not_wait(monkeypatch, tmp_path, place):
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    for name, value in ({"RANK": "0", "WORLD_SIZE": "2"} | place).items():
        monkeypatch.setenv(name, value)
    (tmp_path / "clips").mkdir()
    args = parse_prepare_args(["--data_root", str(tmp_path / "clips"), "--output_dir", str(tmp_path / "out")])
    machines.check_preparation(flag_values(args), tmp_path / "out", "a model", [])
    assert not (tmp_path / "out").exists()


def test_the_first_rank_of_each_machine_reports_the_error_and_all_end(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for local_rank, error in (("0", UserError), ("1", SystemExit)):
        monkeypatch.setenv("LOCAL_RANK", local_rank)
        with pytest.raises(error):
            machines.refuse("a problem")
    machines.refuse(None)
