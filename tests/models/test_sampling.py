"""The caches over denoising steps: what they skip, that videos do not share them, and that nothing of them stays."""

from functools import partial

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel, FirstBlockCacheConfig
from PIL import Image
from step_cost import StepCounter

from data.buckets import Bucket
from diffusion.control_to_video import ControlToVideo
from diffusion.text_to_video import TextToVideo
from memory.activation_bytes import decoding_bytes, sampling_bytes
from memory.activations import checkpoint_activations
from memory.facts import Workload, model_facts
from methods.lora import Lora
from models import sampling
from models.attention import set_attention
from models.compilation import compile_blocks
from models.sampling import cached, sample_video
from models.source import ModelSource
from tiny_steps import assert_same, train_step, with_adapters


SIZE, LORA = Bucket(9, 32, 48), Lora(rank=4, alpha=4)
TIMESTEPS = [999, 832, 666, 499, 332, 166]
# Calls of a block's attention in six guided steps, of one sample each. PAB computes every second time below 800;
# FasterCache omits the sample without the prompt at two of the last three, and at one of these the attention too.
ATTENTIONS = {"none": 12, "first-block": 2, "pab": 2 * 4, "faster": 2 * 3 + 0 + 1 + 2}


@pytest.fixture(autouse=True)
def first_blocks_that_count_as_unchanged(monkeypatch):
    # Those of random weights change more from step to step than the library allows.
    monkeypatch.setattr(sampling, "FirstBlockCacheConfig", partial(FirstBlockCacheConfig, threshold=10.0))


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


def as_in_training(source: ModelSource, scope: str | None = None) -> CogVideoXTransformer3DModel:
    transformer = with_adapters(source.path, dropout=0.0)
    set_attention(transformer)
    if scope:
        checkpoint_activations(transformer, scope)
    return transformer


def as_in_generate(source: ModelSource) -> CogVideoXTransformer3DModel:
    return source.load_transformer(torch.float32).eval()


def pipeline_of(source: ModelSource, transformer: CogVideoXTransformer3DModel) -> CogVideoXPipeline:
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    pipeline = CogVideoXPipeline(None, None, vae, transformer, source.load_scheduler("ddim"))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
def latents_of(pipeline: CogVideoXPipeline, seed: int = 0, guidance_scale: float = 6.0, callback=None) -> torch.Tensor:
    embeds = torch.randn(2, 1, 226, 64, generator=torch.Generator().manual_seed(seed))
    return pipeline(
        prompt_embeds=embeds[0],
        negative_prompt_embeds=embeds[1] if guidance_scale > 1 else None,
        **dict(zip(("num_frames", "height", "width"), SIZE, strict=True)),
        num_inference_steps=len(TIMESTEPS),
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        callback_on_step_end=callback,
    ).frames


@pytest.mark.parametrize("build", [as_in_training, as_in_generate])
@pytest.mark.parametrize("kind", ATTENTIONS)
def test_a_cache_skips_what_it_says_and_no_video_gets_that_of_another(source, build, kind):
    pipeline = pipeline_of(source, build(source))
    attended = []
    layer = pipeline.transformer.transformer_blocks[1].attn1.to_out[0]
    layer.register_forward_hook(lambda module, inputs, output: attended.append(len(output)))
    with cached(pipeline, kind, is_guided=True):
        both = [latents_of(pipeline, seed) for seed in (0, 1)]
    assert pipeline.scheduler.timesteps.tolist() == TIMESTEPS
    assert sum(attended) == 2 * ATTENTIONS[kind]
    with cached(pipeline, kind, is_guided=True):
        assert torch.equal(latents_of(pipeline, 1), both[1])
    assert torch.equal(latents_of(pipeline, 0), both[0]) == (kind == "none")


@pytest.mark.parametrize("kind", ["pab", "faster"])
def test_without_guidance_there_is_no_sample_without_the_prompt_to_skip(source, kind):
    pipeline = pipeline_of(source, as_in_training(source))
    exact = latents_of(pipeline, guidance_scale=1.0)
    with cached(pipeline, kind, is_guided=False):
        assert 0 < (latents_of(pipeline, guidance_scale=1.0) - exact).abs().mean() < 0.5 * exact.abs().mean()


def forwards_of(transformer: CogVideoXTransformer3DModel) -> list[tuple]:
    """What each module has of its own instead of its class's forward pass, and the library's hooks."""
    return [tuple(map(vars(module).get, ("forward", "_diffusers_hook"))) for module in transformer.modules()]


@pytest.mark.parametrize("scope", ["all-but-attention", "segment"])
@pytest.mark.parametrize("kind", ["first-block", "pab", "faster"])
def test_training_steps_see_nothing_of_a_cache_even_if_sampling_fails(source, scope, kind):
    def fail(pipeline, step, timestep, tensors):
        raise MemoryError

    transformer = as_in_training(source, scope)
    pipeline = pipeline_of(source, transformer)
    expected, before = train_step(transformer), forwards_of(transformer)
    with pytest.raises(MemoryError), cached(pipeline, kind, is_guided=True):
        latents_of(pipeline, callback=fail)
    assert_same(train_step(transformer), expected)
    assert forwards_of(transformer) == before


def test_compiled_blocks_are_skipped_as_others_are(source):
    transformer = as_in_training(source).eval()
    pipeline = pipeline_of(source, transformer)
    with cached(pipeline, "first-block", is_guided=True):
        expected = latents_of(pipeline)
    compile_blocks(transformer, 1, backend="eager")
    with cached(pipeline, "first-block", is_guided=True):
        assert torch.allclose(latents_of(pipeline), expected, atol=1e-5)


@pytest.mark.parametrize("is_guided", [True, False])
@pytest.mark.parametrize("kind", ["pab", "faster"])
def test_the_memory_of_a_cache_is_what_is_counted(source, kind, is_guided):
    transformer = as_in_training(source)
    pipeline, held = pipeline_of(source, transformer), []

    def measure(pipeline, step, timestep, tensors):
        hooks = [
            hook for block in transformer.transformer_blocks for hook in block.attn1._diffusers_hook.hooks.values()
        ]
        parts = [torch.utils._pytree.tree_leaves(hook.state.cache) for hook in hooks]
        storages = {part.untyped_storage() for tensors in parts for part in tensors}
        held.append(sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values()))
        return {}

    with cached(pipeline, kind, is_guided=is_guided):
        latents_of(pipeline, guidance_scale=6.0 if is_guided else 1.0, callback=measure)
    facts = model_facts(source.configs(), LORA)
    without, expected = (
        sampling_bytes(facts, Workload(SIZE, 1, "no", SIZE, is_guided, cache)) for cache in ("none", kind)
    )
    assert max(held) == expected - without


def test_the_pixels_of_a_control_stay_until_its_video_is_decoded(source):
    def held(task: TextToVideo | ControlToVideo, control: list[Image.Image] | None) -> list[int]:
        """Return the bytes of tensors when the second step begins, and when the VAE starts to decode."""
        transformer, vae = as_in_generate(source), source.load_vae(torch.float32, slicing=True, tiling=True)
        task.prepare_model(transformer)
        pipeline = task.pipeline_class(None, None, vae, transformer, source.load_scheduler("ddim"))
        moments = []
        for module in (transformer, vae.decoder):
            module.register_forward_pre_hook(lambda *_: moments.append(counter._now))
        steps = {"num_inference_steps": 2, "guidance_scale": 6.0, "use_dynamic_cfg": False, "seed": 0}
        with StepCounter([*transformer.parameters(), *vae.parameters()]) as counter:
            sample_video(pipeline, torch.zeros(226, 64), torch.zeros(226, 64), control, size=SIZE, **steps)
        return moments[1:3]

    task, workload = ControlToVideo(), Workload(SIZE, 1, "no", SIZE)
    plain, controlled = (model_facts(one, LORA) for one in (source.configs(), task.model_configs(source.configs())))
    gray = [Image.new("RGB", (SIZE.width, SIZE.height), "gray")] * SIZE.num_frames
    more = [after - before for before, after in zip(held(TextToVideo(), None), held(task, gray), strict=True)]
    counted = [count(controlled, workload) - count(plain, workload) for count in (sampling_bytes, decoding_bytes)]
    assert more == pytest.approx(counted, rel=0.15)  # and latents, 64 times smaller
