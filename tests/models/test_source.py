"""Components load as asked, and encode text and video as the pipeline and the VAE themselves do."""

import gc
import json
import pickle
import shutil
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXDDIMScheduler,
    CogVideoXDPMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from torch.profiler import ProfilerActivity, profile

from common.errors import UserError
from data.buckets import Bucket, count_tokens
from diffusion.latents import pad_latent_frames
from models.encoding import encode_noised_image, encode_prompts, encode_videos
from models.source import ModelSource


LONG_PROMPT = "a red circle moves over a blue background, " * 100


def draw_video(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Noise in uint8, `[B, F, 3, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, frames, 3, height, width), dtype=torch.uint8, generator=generator)


def copy_configs(model: Path, folder: Path) -> Path:
    """The model's folder without its weights."""
    return Path(shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors")))


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


@pytest.fixture(scope="module")
def text_pipeline(source) -> CogVideoXPipeline:
    return source.load_text_pipeline(torch.float32)


@pytest.fixture(scope="module")
def whole_pipeline(tiny_models) -> CogVideoXPipeline:
    """What a user samples with."""
    return CogVideoXPipeline.from_pretrained(tiny_models("5b"))


@pytest.fixture
def vae(source) -> AutoencoderKLCogVideoX:
    return source.load_vae(torch.float32, slicing=False, tiling=False)


# Text


@pytest.mark.parametrize("prompt", ["a red circle", "", LONG_PROMPT], ids=["short", "empty", "long"])
def test_a_prompt_is_embedded_exactly_as_the_pipeline_embeds_it(text_pipeline, whole_pipeline, prompt):
    with torch.no_grad():  # as in sampling; with gradients, attention takes another path
        expected, _ = whole_pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    embeds = encode_prompts(text_pipeline, [prompt])
    assert embeds.shape == (1, 226, 64)
    assert torch.equal(embeds, expected)


def test_a_prompt_is_cut_after_226_tokens(text_pipeline):
    token_ids = text_pipeline.tokenizer(LONG_PROMPT).input_ids
    assert len(token_ids) > 226
    # The last token of any prompt is </s>, so that 225 tokens of the text are left.
    kept = torch.tensor([[*token_ids[:225], text_pipeline.tokenizer.eos_token_id]])
    with torch.no_grad():
        expected = text_pipeline.text_encoder(kept)[0]
    torch.testing.assert_close(encode_prompts(text_pipeline, [LONG_PROMPT]), expected)


def test_the_length_asked_for_is_that_of_the_embedding(text_pipeline):
    assert encode_prompts(text_pipeline, ["a", LONG_PROMPT], max_sequence_length=32).shape == (2, 32, 64)


def test_the_text_pipeline_holds_nothing_but_tokenizer_and_text_encoder(text_pipeline):
    assert text_pipeline.transformer is None
    assert text_pipeline.vae is None
    assert not any(parameter.requires_grad for parameter in text_pipeline.text_encoder.parameters())


# Video


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (8, 2), (9, 3), (17, 5)])
def test_videos_are_encoded_from_pixels_between_minus_one_and_one(vae, frames, latent_frames):
    videos = draw_video(2, frames, 16, 32)
    pixels = (videos.double() / 127.5 - 1).float().permute(0, 2, 1, 3, 4)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.parameters
    moments = encode_videos(vae, videos)
    assert moments.shape == (2, 32, latent_frames, 2, 4)
    torch.testing.assert_close(moments, expected, atol=1e-4, rtol=1e-4)


class Seen(Exception):
    """Carries what the encoder was given out of the encoding."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_of_the_256_pixel_values_reaches_the_vae_rounded_once(source, dtype):
    def stop(_, inputs):
        raise Seen(inputs[0])

    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16).expand(-1, -1, 3, -1, -1)
    vae = source.load_vae(dtype, slicing=False, tiling=False)
    vae.encoder.register_forward_pre_hook(stop)
    with pytest.raises(Seen) as caught:
        encode_videos(vae, values)
    seen = caught.value.args[0]
    assert seen.dtype == dtype
    exact = (values.double() / 127.5 - 1).permute(0, 2, 1, 3, 4)
    # Half a unit in the last place of dtype; 2e-7 is float32's own two roundings.
    torch.testing.assert_close(seen.double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=2e-7)


def test_slicing_changes_nothing_but_memory(source, vae):
    videos = draw_video(2, 5, 32, 32)
    sliced = source.load_vae(torch.float32, slicing=True, tiling=False)
    assert sliced.use_slicing
    torch.testing.assert_close(encode_videos(sliced, videos), encode_videos(vae, videos), atol=1e-5, rtol=1e-5)


def test_tiling_is_switched_on_when_asked_for(source, vae):
    assert source.load_vae(torch.float32, slicing=False, tiling=True).use_tiling
    assert not vae.use_tiling


def test_tiles_of_the_released_size_fit_together():
    vae = make_tiled_vae(480, 720)
    videos = draw_video(1, 1, 256, 384)  # larger than the tiles, 240 x 360
    moments = encode_videos(vae, videos)
    vae.disable_tiling()
    whole = encode_videos(vae, videos)
    assert moments.shape == whole.shape
    # The first 25 x 36 latents are the first tile's alone. It is normalised by itself, so they agree roughly.
    assert torch.corrcoef(torch.stack([moments[..., :25, :36].flatten(), whole[..., :25, :36].flatten()]))[0, 1] > 0.9


def make_tiled_vae(sample_height: int, sample_width: int) -> AutoencoderKLCogVideoX:
    """A thin VAE whose tiles are half the sample's size, as always, and overlap by a sixth and a fifth."""
    vae = AutoencoderKLCogVideoX(
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=16,
        sample_height=sample_height,
        sample_width=sample_width,
    )
    vae.enable_tiling()
    return vae.eval()


@pytest.mark.parametrize("size", [(64, 96), (48, 48)], ids=["misshapen", "displaced"])
def test_tiles_that_do_not_fit_are_refused(size):
    """Tiles of 32 x 48 pixels begin every 26 x 38 pixels, in the middle of a latent."""
    with pytest.raises(UserError, match=r"--use_tiling, --enable_tiling: .*omit the flag"):
        encode_videos(make_tiled_vae(64, 96), draw_video(1, 1, *size))


def test_videos_no_larger_than_a_tile_are_not_tiled():
    assert encode_videos(make_tiled_vae(64, 96), draw_video(1, 1, 32, 48)).shape == (1, 32, 1, 4, 6)


# Loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_component_is_loaded_in_the_dtype_asked_for(source, component, dtype):
    network = {
        "transformer": lambda: source.load_transformer(dtype),
        "vae": lambda: source.load_vae(dtype, slicing=False, tiling=False),
        "text_encoder": lambda: source.load_text_pipeline(dtype).text_encoder,
    }[component]()
    assert {parameter.dtype for parameter in network.parameters()} == {dtype}


@pytest.mark.gpu
@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_a_component_is_loaded_to_the_device_asked_for_and_can_be_moved_on(source, component):
    device = torch.device("cuda")
    network = {
        "transformer": lambda: source.load_transformer(torch.bfloat16, device=device),
        "vae": lambda: source.load_vae(torch.bfloat16, slicing=False, tiling=False, device=device),
        "text_encoder": lambda: source.load_text_pipeline(torch.bfloat16, device=device).text_encoder,
    }[component]()
    assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"cuda"}
    assert not any(hasattr(part, "_hf_hook") for part in network.modules())
    network.to("cpu")
    assert {tensor.device.type for tensor in [*network.parameters(), *network.buffers()]} == {"cpu"}


@pytest.fixture(scope="module")
def large_source(tiny_models, tmp_path_factory) -> Iterator[ModelSource]:
    """A transformer of 40 million parameters in bfloat16, nearly all of them in the blocks."""
    config = CogVideoXTransformer3DModel.load_config(tiny_models("5b"), subfolder="transformer")
    with torch.device("meta"):
        model = CogVideoXTransformer3DModel.from_config({**config, "num_attention_heads": 16, "num_layers": 12})
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.01)
    folder = tmp_path_factory.mktemp("large")
    model.save_pretrained(folder / "transformer")
    yield ModelSource(str(folder))
    shutil.rmtree(folder)


def most_memory(action: Callable[[], object]) -> tuple[int, object]:
    """The most bytes that torch held on the CPU for an action, mapped files included, and what it returned."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes)), result


@pytest.mark.parametrize(
    ("quantize", "bytes_each"), [("none", 4), ("int8", 1), ("fp8", 1)], ids=["float32", "int8", "fp8"]
)
def test_loading_takes_no_more_host_memory_than_the_file_and_the_result(large_source, quantize, bytes_each):
    """The file is mapped, and each weight is converted on its own."""
    file = large_source.local_folder() / "transformer" / "diffusion_pytorch_model.safetensors"
    num_parameters = file.stat().st_size // 2
    taken, model = most_memory(lambda: large_source.load_transformer(torch.float32, quantize=quantize))
    assert model.dtype == torch.float32
    # A copy of all weights in float32 on the way would be 4 bytes more for each. (torchao's loader looks at the file's
    # header while it is mapped, and so maps it twice for a moment.)
    assert 0.9 * (2 + bytes_each) * num_parameters < taken < (2 + bytes_each + 2) * num_parameters


def test_without_its_encoder_the_vae_decodes_as_ever(source, vae):
    decoder = source.load_vae(torch.float32, slicing=False, tiling=False, decoder_only=True)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(decoder.decode(latents).sample, vae.decode(latents).sample)
    encoders = {name for name in vae.state_dict() if name.startswith("encoder.")}
    assert vae.state_dict().keys() - decoder.state_dict().keys() == encoders != set()


def test_the_vae_is_loaded_frozen(vae):
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())


@pytest.mark.parametrize(("kind", "expected"), [("2b", CogVideoXDDIMScheduler), ("5b", CogVideoXDPMScheduler)])
def test_the_scheduler_is_the_one_that_the_config_names(tiny_models, kind, expected):
    assert type(ModelSource(str(tiny_models(kind))).load_scheduler()) is expected


@pytest.mark.parametrize(("kind", "snr_shift_scale"), [("2b", 3.0), ("5b", 1.0)])
def test_the_scheduler_has_the_models_own_settings(tiny_models, kind, snr_shift_scale):
    config = ModelSource(str(tiny_models(kind))).load_scheduler().config
    assert config.snr_shift_scale == snr_shift_scale
    assert config.prediction_type == "v_prediction"
    assert config.rescale_betas_zero_snr


# Configs


def test_configs_are_read_without_any_weights(tiny_models, tmp_path):
    configs = ModelSource(str(copy_configs(tiny_models("1.5-5b"), tmp_path / "model"))).configs()
    assert configs.transformer["patch_size_t"] == 2
    assert configs.vae["scaling_factor"] == 0.7
    assert configs.scheduler["snr_shift_scale"] == 1.0


@pytest.mark.parametrize("part", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_model_without_a_config_is_refused_in_one_line(tiny_models, tmp_path, part):
    folder = copy_configs(tiny_models("5b"), tmp_path / "model")
    (folder / part).unlink()
    with pytest.raises(UserError, match=r"^--pretrained_model_name_or_path: cannot read the model") as caught:
        ModelSource(str(folder)).configs()
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_model_of_another_family_is_refused_by_name(tiny_models, tmp_path, part):
    folder = copy_configs(tiny_models("5b"), tmp_path / "model")
    file = folder / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "HunyuanVideo"}))
    with pytest.raises(UserError, match=r"^--pretrained_model_name_or_path: .* not a CogVideoX model: .*HunyuanVideo"):
        ModelSource(str(folder)).configs()


def test_a_model_that_is_nowhere_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"--pretrained_model_name_or_path: .*nobody/nothing") as caught:
        ModelSource("nobody/nothing").configs()
    assert "\n" not in str(caught.value)


def test_the_fingerprint_tells_folders_and_revisions_apart(tiny_models, monkeypatch):
    folder = tiny_models("5b")
    monkeypatch.chdir(folder.parent)
    assert ModelSource("5b").fingerprint() == ModelSource(str(folder)).fingerprint() == str(folder)
    fingerprints = {
        ModelSource(path, revision=revision).fingerprint() for path in ("a/b", "a/c") for revision in (None, "1", "2")
    }
    assert len(fingerprints) == 6
    assert ModelSource("a/b").fingerprint() == ModelSource("a/b", revision="main").fingerprint()


# Images under noise


def test_an_image_without_noise_is_encoded_as_a_video_of_one_frame(vae):
    video = draw_video(1, 1, 32, 48)
    encoded = encode_noised_image(vae, video[0, 0], torch.zeros(2), torch.Generator().manual_seed(0))
    assert encoded.shape == (2, 32, 1, 4, 6)
    assert torch.equal(encoded, encode_videos(vae, video).expand(2, -1, -1, -1, -1))


def test_the_noise_is_added_to_the_pixels_at_the_strength_asked_for(vae):
    image = draw_video(1, 1, 32, 48)[0, 0]
    noise = torch.randn(1, *image.shape, generator=torch.Generator().manual_seed(3))
    pixels = image.double() / 127.5 - 1 + 0.25 * noise[0].double()
    with torch.no_grad():
        expected = vae.encode(pixels.float()[None, :, None]).latent_dist.parameters
    encoded = encode_noised_image(vae, image, torch.tensor([0.25]), torch.Generator().manual_seed(3))
    torch.testing.assert_close(encoded, expected, atol=1e-4, rtol=1e-4)


# Captions that are too long


def test_captions_of_more_tokens_than_the_model_reads_are_counted(source):
    pipeline = source.load_text_pipeline(torch.float32)
    fitting = "word " * 40
    assert len(fitting) < 226 < len(pipeline.tokenizer(LONG_PROMPT).input_ids)
    assert source.count_long_captions([fitting, LONG_PROMPT, "short", LONG_PROMPT], 226) == 2
    assert source.count_long_captions(["short"], 226) == 0


# Where the encoders are


def test_a_local_model_has_its_encoders_at_hand_and_an_unknown_one_on_the_hub_does_not(source, tmp_path):
    assert source.local_folder() == Path(source.path)
    assert ModelSource("nobody/nothing", cache_dir=str(tmp_path)).local_folder() is None


def test_a_model_on_the_hub_is_found_where_it_was_downloaded_to(tiny_models, tmp_path):
    snapshot = tmp_path / "models--org--tiny" / "snapshots" / "abc"
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(tiny_models("5b"), snapshot)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("abc")
    assert ModelSource("org/tiny", cache_dir=str(tmp_path)).local_folder() == snapshot


# Tokens


@pytest.mark.parametrize("kind", ["5b", "1.5-5b"])
def test_tokens_are_those_that_a_real_model_sees(tiny_models, kind):
    vae = AutoencoderKLCogVideoX.from_pretrained(tiny_models(kind), subfolder="vae")
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_models(kind), subfolder="transformer")
    config = transformer.config
    text = torch.zeros(1, config.max_text_seq_length, config.text_embed_dim)
    for num_frames in (1, 4, 5, 8, 9, 12, 13, 16, 17):
        with torch.no_grad():
            latents = vae.encode(torch.zeros(1, 3, num_frames, 32, 48)).latent_dist.mean.permute(0, 2, 1, 3, 4)
            embedded = transformer.patch_embed(text, pad_latent_frames(latents, config.patch_size_t))
        assert embedded.shape[1] == count_tokens(config, Bucket(num_frames, 32, 48))


@pytest.mark.parametrize(("value", "pixel"), [(0, -1.0), (255, 1.0), (51, -0.6)])
def test_the_vae_sees_pixels_from_minus_one_to_one(vae, value, pixel):
    with torch.no_grad():
        expected = vae.encode(torch.full((1, 3, 5, 32, 48), pixel)).latent_dist.parameters
    moments = encode_videos(vae, torch.full((1, 5, 3, 32, 48), value, dtype=torch.uint8))
    torch.testing.assert_close(moments, expected, atol=1e-4, rtol=1e-4)


# Models of strangers


class Evil:
    """Runs code when it is unpickled."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


PARTS = {
    "transformer": lambda source: source.load_transformer(torch.float32),
    "vae": lambda source: source.load_vae(torch.float32, slicing=False, tiling=False),
    "text_encoder": lambda source: source.load_text_pipeline(torch.float32),
}


@pytest.mark.parametrize("part", PARTS)
def test_weights_that_would_run_code_are_refused_and_not_run(tiny_models, tmp_path, part):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    for file in (model / part).glob("*.safetensors*"):
        file.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (model / part / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match="cannot be loaded: ") as caught:
        PARTS[part](ModelSource(str(model)))
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_its_files_is_refused_and_not_one_that_knows_no_words(tiny_models, tmp_path):
    source = ModelSource(str(shutil.copytree(tiny_models("5b"), tmp_path / "model")))
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    for ask in (
        lambda: source.load_text_pipeline(torch.float32),
        lambda: source.count_long_captions([LONG_PROMPT], 226),
    ):
        with pytest.raises(UserError, match=r"^the tokenizer of the model '.*' (knows no words|cannot be loaded)"):
            ask()


@pytest.mark.parametrize(
    ("kind", "latents", "pixels"),
    [
        ("5b", (60, 90), (480, 720)),
        ("5b", (300, 300), (2400, 2400)),
        ("1.5-5b", (300, 300), (768, 1360)),
        ("1.5-5b-i2v", (96, 170), (768, 1360)),
        ("1.5-5b", (60, 90), (480, 720)),
    ],
)
def test_the_native_size_is_the_configs_but_for_1_5_whose_positions_reach_farther(tiny_models, kind, latents, pixels):
    configs = ModelSource(str(tiny_models(kind))).configs()
    configs.transformer.update(sample_height=latents[0], sample_width=latents[1], sample_frames=81)
    assert configs.native_size == (81, *pixels)


def test_a_tokenizer_with_code_of_its_own_does_not_run_it(tiny_models, tmp_path):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    config = json.loads((model / "tokenizer/tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (model / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    (model / "tokenizer/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match=r"the tokenizer of the model .* cannot be loaded"):
        ModelSource(str(model)).count_long_captions(["a" * 300], 226)
    assert not (tmp_path / "ran").exists()
