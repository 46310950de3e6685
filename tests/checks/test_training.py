"""Trackers that are asked for are there."""

import sys

import pytest

from checks.training import check_tracker
from common.errors import UserError


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "comet_ml"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])  # nothing is installed there
    for module in [
        module for module in sys.modules if module.startswith(("tensorboard", "wandb", "trackio", "comet_ml"))
    ]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match=f"^--report_to {name}: not installed; pip install {name}, or"):
        check_tracker(name)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "all", "none"])
def test_those_that_are_installed_and_no_name_at_all_will_do(name):
    check_tracker(name)
