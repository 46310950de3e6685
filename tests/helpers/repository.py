"""Where the repository and its parts are."""

from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
TRAINING = ROOT / "training"
SCRIPTS = ROOT / "assets" / "scripts"
