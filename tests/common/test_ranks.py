"""A process knows its place in a launch, or that it is the only one."""

import pytest

from common import ranks


def test_a_launched_process_knows_its_place(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    assert (ranks.launch_rank(), ranks.launch_size(), ranks.local_rank(), ranks.local_size()) == (5, 8, 1, 4)
    assert (ranks.machine_rank(), ranks.num_machines()) == (1, 2)


def test_by_default_all_processes_are_on_one_machine(monkeypatch):
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "")):
        monkeypatch.setenv(name, value)
    assert (ranks.local_size(), ranks.machine_rank(), ranks.num_machines()) == (8, 0, 1)


@pytest.mark.parametrize("value", [None, ""])
def test_a_process_without_a_launch_is_the_only_one(monkeypatch, value):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    assert (ranks.launch_rank(), ranks.launch_size(), ranks.local_rank()) == (0, 1, 0)


def test_a_launch_without_a_parallelism_config_divides_nothing(monkeypatch):
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "4")
    assert ranks.launch_parallelism() == {}
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    sizes = {"dp_replicate_size": 1, "dp_shard_size": 1, "tp_size": 1, "cp_size": 4, "sp_size": 1}
    assert ranks.launch_parallelism() == sizes
