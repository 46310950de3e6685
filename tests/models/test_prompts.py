"""Each prompt is embedded once, by one rank, and loaded by all."""

import shutil
from pathlib import Path

import pytest
import torch

from models.encoding import encode_prompts
from models.prompts import PromptCache
from models.source import ModelSource


PROMPTS = ["a red circle", "a blue square", "a green triangle", "an orange circle", ""]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


@pytest.fixture
def cache(source, tmp_path) -> PromptCache:
    return PromptCache(tmp_path / "prompt_embeds", source, torch.float32)


def times_of(cache: PromptCache) -> dict[Path, int]:
    return {file: file.stat().st_mtime_ns for file in cache.folder.glob("*.safetensors")}


def test_each_distinct_prompt_is_embedded_once(cache):
    cache.embed([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], CPU)
    before = times_of(cache)
    assert len(before) == 2
    with pytest.raises(FileNotFoundError):
        cache.load(PROMPTS[2])
    cache.embed(PROMPTS[:3], CPU)
    assert len(times_of(cache)) == 3
    assert before.items() <= times_of(cache).items()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_embedding_is_that_of_the_text_encoder(source, tmp_path, dtype):
    cache = PromptCache(tmp_path, source, dtype)
    cache.embed(PROMPTS, CPU)
    pipeline = source.load_text_pipeline(dtype)
    for prompt in PROMPTS:
        assert cache.load(prompt).shape == (226, 64)
        assert torch.equal(cache.load(prompt), encode_prompts(pipeline, [prompt])[0])


def test_no_model_is_loaded_if_nothing_is_missing(tiny_models, tmp_path):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    cache = PromptCache(tmp_path / "prompt_embeds", ModelSource(str(model)), torch.float32)
    cache.embed(PROMPTS, CPU)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(model / part)
    cache.embed(PROMPTS[::-1], CPU)
    cache.embed([], CPU)
    assert len(times_of(cache)) == len(PROMPTS)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_ranks_embed_every_prompt_even_one_after_the_other(cache, order):
    for rank in order:
        before = len(times_of(cache))
        cache.embed(PROMPTS, CPU, rank=rank, world_size=2)
        assert len(times_of(cache)) - before == 3 - rank
    assert all(cache.load(prompt).shape == (226, 64) for prompt in PROMPTS)


def test_models_and_dtypes_share_a_folder_without_sharing_embeddings(tiny_models, tmp_path):
    for source in [ModelSource(str(tiny_models(kind))) for kind in ("2b", "5b")]:
        for dtype in (torch.float32, torch.bfloat16):
            PromptCache(tmp_path, source, dtype).embed(PROMPTS[:1], CPU)
    assert len(list(tmp_path.iterdir())) == 4
