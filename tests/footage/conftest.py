from pathlib import Path

import pytest

from make_footage import Shot, make_footage


@pytest.fixture(scope="package")
def film(tmp_path_factory) -> tuple[Path, list[Shot]]:
    """A drawn film of half a minute, and its scenes."""
    folder = tmp_path_factory.mktemp("drawn") / "films"
    shots = make_footage(folder, 1, 0.5, seed=3)["film-00.mp4"]
    return folder / "film-00.mp4", shots
