"""A tiny transformer with four blocks and its expected training step."""

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from tiny_steps import Result, train_step, with_adapters


@pytest.fixture(scope="module")
def resident(tiny_models) -> CogVideoXTransformer3DModel:
    return with_adapters(tiny_models("5b"))


@pytest.fixture(scope="module")
def expected(resident) -> Result:
    return train_step(resident)


@pytest.fixture
def transformer(resident) -> CogVideoXTransformer3DModel:
    return deepcopy(resident)


@pytest.fixture
def one_process(tmp_path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()
