"""A process knows its place in a launch, or that it is the only one."""

import os

import pytest

from common import ranks


VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def test_a_launched_process_knows_its_place(monkeypatch):
    for name, value in zip(VARIABLES, "5814", strict=True):
        monkeypatch.setenv(name, value)
    ranks.forget_stray_ranks()
    assert (ranks.launch_rank(), ranks.launch_size(), ranks.local_rank(), ranks.local_size()) == (5, 8, 1, 4)
    assert (ranks.machine_rank(), ranks.num_machines()) == (1, 2)


def test_by_default_all_processes_are_on_one_machine(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "")):
        monkeypatch.setenv(name, value)
    assert (ranks.local_size(), ranks.machine_rank(), ranks.num_machines()) == (8, 0, 1)


@pytest.mark.parametrize(
    "stray",
    [{}, dict.fromkeys(VARIABLES, ""), {"RANK": "8"}, {"RANK": "8", "LOCAL_RANK": "0"}, {"WORLD_SIZE": "8"}],
    ids=str,
)
def test_a_process_without_a_launch_is_the_only_one_and_keeps_stray_variables_from_accelerate(monkeypatch, stray):
    for name in VARIABLES:
        monkeypatch.setenv(name, stray[name]) if name in stray else monkeypatch.delenv(name, raising=False)
    assert (ranks.launch_rank(), ranks.launch_size(), ranks.local_rank(), ranks.local_size()) == (0, 1, 0, 1)
    ranks.forget_stray_ranks()
    assert not os.environ.keys() & {*VARIABLES}


def test_a_launch_without_a_parallelism_config_divides_nothing(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert ranks.launch_parallelism() == {}
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    sizes = {"dp_replicate_size": 1, "dp_shard_size": 1, "tp_size": 1, "cp_size": 4, "sp_size": 1}
    assert ranks.launch_parallelism() == sizes
