"""A run reports its memory by phases."""

import logging

import pytest
import torch

from tracking.peak_memory import PeakMemory


def test_each_phase_is_logged_before_and_after_and_a_cpu_has_only_the_hosts_memory(caplog):
    caplog.set_level(logging.INFO)
    memory = PeakMemory(torch.device("cpu"))
    with memory.phase("training"), memory.phase("validation", " at step 5"):
        pass
    moments = ["before training", "before validation at step 5", "after validation at step 5", "after training"]
    assert [message.split(":")[0] for message in caplog.messages] == [f"memory {moment}" for moment in moments]
    assert all(": host " in message and "allocated" not in message for message in caplog.messages)
    assert memory.describe().startswith("peak memory: host ") and "\n" not in memory.describe()


@pytest.mark.gpu
def test_the_peaks_of_a_phase_are_its_own(caplog):
    caplog.set_level(logging.INFO)
    memory = PeakMemory(torch.device("cuda"))
    with memory.phase("training"):
        torch.empty(2**30, dtype=torch.uint8, device="cuda")
        with memory.phase("validation"):
            torch.empty(2**20, dtype=torch.uint8, device="cuda")
    training, validation = (memory.phases[phase]["allocated"] for phase in ("training", "validation"))
    assert training >= 2**30 > validation >= 2**20
    assert memory.phases["training"]["reserved"] >= training
    assert "allocated; peak of training: host " in caplog.text
