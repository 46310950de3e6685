"""`control_demo.sh`: a LoRA teaches the tiny model to follow silhouettes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT


@pytest.mark.slow
def test_the_shapes_of_the_trained_model_are_where_the_controls_say(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"DEMO_DIR": str(tmp_path / "demo"), "DEMO_VIDEOS": "8", "CPU_THREADS": "1", "PATH": path}
    subprocess.run(["bash", ROOT / "assets/scripts/control_demo.sh"], env=os.environ | settings, check=True)
    measured = json.loads((tmp_path / "demo/control.json").read_text())
    assert measured["videos"] == 8
    assert measured["base"] < 0.3 and measured["trained"] > 0.6
