"""Fixtures for many tests: tiny models and clips, made once a session; no network."""

import gc
import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings


if TYPE_CHECKING:
    from playwright.sync_api import Browser


settings.register_profile("suite", deadline=None)  # a busy machine is not a failure
settings.load_profile("suite")
os.environ |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "offline"}


# They start first, so that no process is busy with one of them when the others are done.
LONGEST = tuple(f"test_{name}.py" for name in ("demo", "readme", "finetune", "distributed", "chaos", "recipes"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, in that order; skip GPU tests where there is no GPU."""
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(LONGEST)))
    for_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if for_gpu:
        import torch

        missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
        for item in for_gpu:
            item.add_marker(missing)


def pytest_collection_finish() -> None:
    """Exclude what the tests have imported from garbage collection, which a run in a test starts several times."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish() -> None:
    """Undo `gc.freeze`: extension modules report what is not collected at exit."""
    gc.unfreeze()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Use one thread: for tensors so small that several only wait for one another."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what was compiled, before and after."""
    import torch

    torch._dynamo.reset()
    with torch._dynamo.config.patch(optimize_ddp=torch._dynamo.config.optimize_ddp):
        yield
    torch._dynamo.reset()


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory) -> Path:
    """Keep the clip cache of the tests out of the user's."""
    os.environ["COGVIDEOX_FACTORY_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    return Path(os.environ["COGVIDEOX_FACTORY_CACHE"])


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Reset the state that accelerate keeps per process; for users each run is a separate process."""
    from accelerate.state import AcceleratorState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory) -> Callable[[str], Path]:
    """Return the folder of a tiny model by its kind (2b, 5b, 5b-i2v, 1.5-5b, 1.5-5b-i2v), native size 17 x 64 x 96."""
    from make_tiny_model import make_tiny_model

    root = tmp_path_factory.mktemp("models")
    return lambda kind: make_tiny_model(kind, root / kind)


@pytest.fixture(scope="session")
def demo_clips(tmp_path_factory) -> Path:
    """A folder of 16 drawn clips with prompts.txt, videos.txt and metadata.csv."""
    from make_demo_clips import make_demo_clips

    folder = tmp_path_factory.mktemp("clips") / "demo"
    make_demo_clips(folder, count=16)
    return folder


@pytest.fixture(scope="session")
def prepared_demo(tiny_models, demo_clips, tmp_path_factory) -> Callable[..., Path]:
    """Return the folder of the demo clips prepared with a tiny model, by flags of preparation; read-only."""
    import prepare_dataset

    @cache
    def prepare(*flags: str, kind: str = "5b") -> Path:
        folder = tmp_path_factory.mktemp("prepared-demo")
        places = ["--model_id", str(tiny_models(kind)), "--data_root", str(demo_clips), "--output_dir", str(folder)]
        prepare_dataset.main([*places, *flags, "--save_latents_and_embeddings"])
        return folder

    return prepare


@pytest.fixture(scope="session")
def object_store() -> Iterator["ObjectStore"]:  # noqa: F821
    """A real S3 server on this machine, which can be made to fail; see `bucket`."""
    from object_store import ObjectStore

    store = ObjectStore()
    yield store
    store.stop()


@pytest.fixture
def bucket(object_store, monkeypatch, tmp_path) -> "Bucket":  # noqa: F821
    """An empty bucket of the object store, with an empty cache, and without pauses before another try."""
    from common import remote, stores

    for name, value in object_store.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("COGVIDEOX_FACTORY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(stores, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setattr(stores, "_warned", set())
    monkeypatch.setattr(remote, "_room", 0)
    return object_store.bucket()


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Headless Chromium. Not for the session: while Playwright runs, nothing else can use asyncio in its process."""
    from browser import CHROMIUM, start_chromium

    if CHROMIUM is None:
        pytest.skip("needs chromium")
    with start_chromium() as browser:
        yield browser
