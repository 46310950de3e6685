"""Weights in one process; for sharded ones see test_distributed.py."""

import pytest
import torch
from accelerate import Accelerator

from methods.lora import Lora
from parallel.sharding import gather_weights, load_state, save_state
from tiny_steps import with_adapters


pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_in_one_process_the_weights_are_not_copied(tiny_models):
    transformer = with_adapters(tiny_models("5b"))
    names = Lora(4, 4.0).weight_names(transformer)
    weights = gather_weights(Accelerator(cpu=True), transformer, names)
    assert list(weights) == names
    state = transformer.state_dict()
    assert all(weight.data_ptr() == state[name].data_ptr() for name, weight in weights.items())


def test_a_state_is_loaded_as_it_was_saved(tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(torch.nn.Linear(2, 2))
    before = model.weight.detach().clone()
    save_state(accelerator, tmp_path)
    torch.nn.init.zeros_(model.weight)
    load_state(accelerator, tmp_path)
    assert torch.equal(model.weight, before)
