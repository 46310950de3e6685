"""The tiny model that most tests train."""

from pathlib import Path

import pytest
from diffusers import CogVideoXTransformer3DModel

from forward_pass import load


@pytest.fixture
def model(tiny_models) -> Path:
    return tiny_models("2b")


@pytest.fixture
def transformer(model) -> CogVideoXTransformer3DModel:
    return load(model)
