"""A tracker that is chosen by name must be installed."""

import sys

import pytest

from checks.training import check_tracker
from common.errors import UserError


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "comet_ml"])
def test_a_tracker_that_is_not_installed_is_refused_by_name(monkeypatch, name):
    monkeypatch.setattr(sys, "path", [])  # nothing is installed there
    for module in [one for one in sys.modules if one.startswith(("tensorboard", "wandb", "trackio", "comet_ml"))]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(UserError, match=f"^--report_to {name}: not installed; pip install {name}, or"):
        check_tracker(name)


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "all", "none"])
def test_installed_trackers_all_and_none_are_accepted(name):
    check_tracker(name)
