"""Run the demos of `assets/scripts` on eight videos."""

import json
import os
import subprocess
import sys
from pathlib import Path

from repository import ROOT


def run_demo(script: str, folder: Path, **settings: str) -> dict[str, dict[str, float]]:
    """Return what a demo measured, by what the overlaps are of."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings |= {"DEMO_DIR": str(folder / "demo"), "DEMO_VIDEOS": "8", "CPU_THREADS": "1", "PATH": path}
    subprocess.run(["bash", ROOT / "assets/scripts" / script], env=os.environ | settings, check=True)
    return json.loads((folder / "demo/measured.json").read_text())
