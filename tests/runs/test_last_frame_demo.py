"""`last_frame_demo.sh`: full fine-tuning teaches the tiny model to end at a given frame."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repository import ROOT


@pytest.mark.slow
def test_the_videos_of_the_trained_model_end_at_the_given_frames(tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"DEMO_DIR": str(tmp_path / "demo"), "DEMO_VIDEOS": "8", "CPU_THREADS": "1", "PATH": path}
    subprocess.run(["bash", ROOT / "assets/scripts/last_frame_demo.sh"], env=os.environ | settings, check=True)
    measured = json.loads((tmp_path / "demo/last-frame.json").read_text())
    assert measured["videos"] == 8
    assert measured["base"] < 0.25 and measured["trained"] > 0.45
