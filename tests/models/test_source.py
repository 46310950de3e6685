"""Components are loaded as requested, and encode text and video as the pipeline and the VAE do."""

import gc
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from itertools import accumulate, product
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
from models.configs import precision_warning
from models.encoding import encode_noised_images, encode_prompts, encode_videos
from models.source import ModelSource


LONG_PROMPT = "a red circle moves over a blue background, " * 100


def draw_video(batch: int, frames: int, height: int, width: int) -> torch.Tensor:
    """Noise in uint8, `[B, F, 3, H, W]`."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (batch, frames, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


@pytest.fixture(scope="module")
def text_pipeline(source) -> CogVideoXPipeline:
    return source.load_text_pipeline(torch.float32)


@pytest.fixture
def vae(source) -> AutoencoderKLCogVideoX:
    return source.load_vae(torch.float32, slicing=False, tiling=False)


@pytest.mark.parametrize("prompt", ["a red circle", "", LONG_PROMPT], ids=["short", "empty", "long"])
def test_a_prompt_is_embedded_exactly_as_by_the_pipeline(tiny_models, text_pipeline, prompt):
    pipeline = CogVideoXPipeline.from_pretrained(tiny_models("5b"))
    with torch.no_grad():  # as in sampling; with gradients, attention takes another path
        expected, _ = pipeline.encode_prompt([prompt], do_classifier_free_guidance=False)
    embeds = encode_prompts(text_pipeline, [prompt])
    assert embeds.shape == (1, 226, 64)
    assert torch.equal(embeds, expected)


def test_the_text_pipeline_holds_only_a_frozen_text_encoder_and_its_tokenizer(text_pipeline):
    assert encode_prompts(text_pipeline, ["a", LONG_PROMPT], max_sequence_length=32).shape == (2, 32, 64)
    assert (text_pipeline.transformer, text_pipeline.vae) == (None, None)
    assert not any(parameter.requires_grad for parameter in text_pipeline.text_encoder.parameters())


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (8, 2), (9, 3), (17, 5)])
def test_videos_are_encoded_from_pixels_between_minus_one_and_one(vae, frames, latent_frames):
    videos = draw_video(2, frames, 16, 32)
    pixels = (videos.double() / 127.5 - 1).float().permute(0, 2, 1, 3, 4)
    with torch.no_grad():
        expected = vae.encode(pixels).latent_dist.parameters
    moments = encode_videos(vae, videos)
    assert moments.shape == (2, 32, latent_frames, 2, 4)
    torch.testing.assert_close(moments, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_each_of_the_256_pixel_values_reaches_the_vae_rounded_once(source, dtype):
    values = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 1, 16, 16).expand(-1, -1, 3, -1, -1)
    vae, seen = source.load_vae(dtype, slicing=False, tiling=False), []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encode_videos(vae, values)
    assert seen[0].dtype == dtype
    exact = (values.double() / 127.5 - 1).permute(0, 2, 1, 3, 4)
    # Half a unit in the last place of dtype; 2e-7 is float32's own two roundings.
    torch.testing.assert_close(seen[0].double(), exact, rtol=torch.finfo(dtype).eps / 2, atol=2e-7)


def test_slicing_does_not_change_the_result(source, vae):
    videos = draw_video(2, 5, 32, 32)
    sliced = source.load_vae(torch.float32, slicing=True, tiling=True)
    assert (sliced.use_slicing, sliced.use_tiling) == (True, True)
    assert (vae.use_slicing, vae.use_tiling) == (False, False)
    torch.testing.assert_close(encode_videos(sliced, videos), encode_videos(vae, videos), atol=1e-5, rtol=1e-5)


def test_tiles_of_the_released_size_fit_together():
    vae = make_tiled_vae(480, 720)
    videos = draw_video(1, 1, 256, 384)  # larger than the tiles, 240 x 360
    moments = encode_videos(vae, videos)
    vae.disable_tiling()
    untiled = encode_videos(vae, videos)
    assert moments.shape == untiled.shape
    # The first 25 x 36 latents are only the first tile's. It is normalized separately, so they agree roughly.
    first = torch.stack([latents[..., :25, :36].flatten() for latents in (moments, untiled)])
    assert torch.corrcoef(first)[0, 1] > 0.9


def make_tiled_vae(sample_height: int, sample_width: int) -> AutoencoderKLCogVideoX:
    """Build a thin VAE with the default tiles: half the sample's size, overlapping by a sixth and a fifth."""
    config = {"block_out_channels": (4, 4, 4, 4), "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 16}
    vae = AutoencoderKLCogVideoX(**config, sample_height=sample_height, sample_width=sample_width)
    vae.enable_tiling()
    return vae.eval()


@pytest.mark.parametrize("size", [(64, 96), (48, 48)], ids=["misshapen", "displaced"])
def test_tiles_that_do_not_fit_are_refused(size):
    """Tiles of 32 x 48 pixels start every 26 x 38 pixels, in the middle of a latent."""
    with pytest.raises(UserError, match=r"--use_tiling, --enable_tiling: .*omit the flag"):
        encode_videos(make_tiled_vae(64, 96), draw_video(1, 1, *size))
    # A video no larger than a tile is not tiled.
    assert encode_videos(make_tiled_vae(64, 96), draw_video(1, 1, 32, 48)).shape == (1, 32, 1, 4, 6)


LOADERS = {
    "transformer": lambda source, *options, **device: source.load_transformer(*options, **device),
    "vae": lambda source, *options, **device: source.load_vae(*options, slicing=False, tiling=False, **device),
    "text_encoder": lambda source, *options, **device: source.load_text_pipeline(*options, **device).text_encoder,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("component", LOADERS)
def test_a_component_is_loaded_in_the_requested_dtype(source, component, dtype):
    assert {parameter.dtype for parameter in LOADERS[component](source, dtype).parameters()} == {dtype}


@pytest.mark.gpu
@pytest.mark.parametrize("component", LOADERS)
def test_a_component_is_loaded_to_the_requested_device_and_can_be_moved(source, component):
    network = LOADERS[component](source, torch.bfloat16, device=torch.device("cuda"))
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
    """Return the peak CPU memory of an action in bytes, mapped files included, and its result."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = action()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))), result


@pytest.mark.parametrize(
    ("quantize", "bytes_each"), [("none", 4), ("int8", 1), ("fp8", 1)], ids=["float32", "int8", "fp8"]
)
def test_loading_needs_no_more_host_memory_than_the_file_and_the_result(large_source, quantize, bytes_each):
    file = large_source.local_folder() / "transformer" / "diffusion_pytorch_model.safetensors"
    num_parameters = file.stat().st_size // 2
    taken, model = most_memory(lambda: large_source.load_transformer(torch.float32, quantize=quantize))
    assert model.dtype == torch.float32
    # A float32 copy of all weights would add 4 bytes each. (torchao's loader briefly maps the file twice.)
    assert 0.9 * (2 + bytes_each) * num_parameters < taken < (2 + bytes_each + 2) * num_parameters


def test_the_vae_is_loaded_frozen_and_decodes_without_its_encoder(source, vae):
    assert not vae.training
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    decoder = source.load_vae(torch.float32, slicing=False, tiling=False, decoder_only=True)
    latents = torch.randn(1, 16, 2, 4, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(decoder.decode(latents).sample, vae.decode(latents).sample)
    encoders = {name for name in vae.state_dict() if name.startswith("encoder.")}
    assert vae.state_dict().keys() - decoder.state_dict().keys() == encoders != set()


@pytest.mark.parametrize(
    ("kind", "expected", "snr_shift_scale"), [("2b", CogVideoXDDIMScheduler, 3.0), ("5b", CogVideoXDPMScheduler, 1.0)]
)
def test_the_scheduler_has_the_class_and_settings_of_the_config(tiny_models, kind, expected, snr_shift_scale):
    source = ModelSource(str(tiny_models(kind)))
    scheduler = source.load_scheduler()
    assert type(scheduler) is expected
    assert scheduler.config.snr_shift_scale == snr_shift_scale
    for name, chosen in {"ddim": CogVideoXDDIMScheduler, "dpm": CogVideoXDPMScheduler}.items():
        assert type(source.load_scheduler(name)) is chosen
        assert torch.equal(source.load_scheduler(name).alphas_cumprod, scheduler.alphas_cumprod)
    assert scheduler.config.prediction_type == "v_prediction"
    assert scheduler.config.rescale_betas_zero_snr


@pytest.fixture
def weightless(tiny_models, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_models("5b"), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors")))


def test_configs_are_read_without_any_weights(weightless):
    configs = ModelSource(str(weightless)).configs()
    assert configs.transformer["patch_size_t"] is None
    assert configs.vae["scaling_factor"] == 0.7
    assert configs.scheduler["snr_shift_scale"] == 1.0


def test_only_fp16_for_a_bfloat16_model_is_warned_about_with_a_fix():
    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    warnings = {pair: precision_warning(*pair) for pair in product(dtypes, dtypes)}
    warning = warnings.pop((torch.float16, torch.bfloat16))
    assert "black videos" in warning
    assert warning.endswith("use --mixed_precision bf16")
    assert set(warnings.values()) == {None}


@pytest.mark.parametrize("part", ["transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json"])
def test_a_model_without_a_config_is_refused_in_one_line(weightless, part):
    (weightless / part).unlink()
    words = f"^--pretrained_model_name_or_path: cannot read the model '{re.escape(str(weightless))}': .*$"
    with pytest.raises(UserError, match=words):
        ModelSource(str(weightless)).configs()


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_a_model_of_another_family_is_refused_by_name(weightless, part):
    file = weightless / part / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "_class_name": "HunyuanVideo"}))
    with pytest.raises(UserError, match=r"^--pretrained_model_name_or_path: .* not a CogVideoX model: .*HunyuanVideo"):
        ModelSource(str(weightless)).configs()


def test_a_missing_model_is_refused_in_one_line():
    with pytest.raises(UserError, match=r"^--pretrained_model_name_or_path: .*nobody/nothing.*$"):
        ModelSource("nobody/nothing").configs()


def test_a_model_of_the_hub_that_is_not_here_says_that_this_is_offline(tmp_path):
    source = ModelSource("a/b", cache_dir=str(tmp_path))
    said = rf"offline \(HF_HUB_OFFLINE is set\), and its files are not all in {tmp_path}; run `hf download a/b`"
    for load in (source.configs, lambda: source.load_text_pipeline(torch.float32), lambda: source.download("vae")):
        with pytest.raises(UserError, match=said):
            load()


def test_the_fingerprint_tells_folders_and_revisions_apart(tiny_models, monkeypatch):
    folder = tiny_models("5b")
    monkeypatch.chdir(folder.parent)
    assert ModelSource("5b").fingerprint() == ModelSource(str(folder)).fingerprint() == str(folder)
    fingerprints = {
        ModelSource(path, revision=revision).fingerprint() for path in ("a/b", "a/c") for revision in (None, "1", "2")
    }
    assert len(fingerprints) == 6
    assert ModelSource("a/b").fingerprint() == ModelSource("a/b", revision="main").fingerprint()


def test_an_image_is_encoded_as_a_video_of_one_frame_with_noise_of_the_requested_strength(vae):
    video = draw_video(1, 1, 32, 48)
    noise = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    pixels = video[0, 0].double() / 127.5 - 1 + 0.25 * noise[1].double()
    with torch.no_grad():
        expected = vae.encode(pixels.float()[None, :, None]).latent_dist.parameters
    encoded = encode_noised_images(vae, video[0, :1], torch.tensor([0, 0.25]), torch.Generator().manual_seed(3))
    assert torch.equal(encoded[:1], encode_videos(vae, video))
    torch.testing.assert_close(encoded[1:], expected, atol=1e-4, rtol=1e-4)


def test_captions_of_more_tokens_than_the_model_reads_are_counted(source, text_pipeline):
    fitting = "word " * 40
    assert len(fitting) < 226 < len(text_pipeline.tokenizer(LONG_PROMPT).input_ids)
    assert source.find_long_captions([fitting, LONG_PROMPT, "short", LONG_PROMPT], 226) == {LONG_PROMPT}
    assert source.find_long_captions(["short"], 226) == set()


def test_captions_mostly_of_characters_unknown_to_the_tokenizer_are_found(source):
    chinese, mixed = "一只熊猫在竹林里弹吉他", "熊猫 means panda"
    assert source.find_unknown_captions(["A panda.", chinese, mixed, f"BW {chinese}"]) == {chinese, f"BW {chinese}"}
    assert source.find_unknown_captions(["A panda."]) == set()


def test_a_local_or_downloaded_model_has_a_folder_and_an_unknown_one_has_none(source, tiny_models, tmp_path):
    assert source.local_folder() == Path(source.path)
    assert ModelSource("nobody/nothing", cache_dir=str(tmp_path)).local_folder() is None
    cache = tmp_path / "models--org--tiny"
    snapshot = shutil.copytree(tiny_models("5b"), cache / "snapshots" / "abc")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    assert ModelSource("org/tiny", cache_dir=str(tmp_path)).local_folder() == snapshot


@pytest.mark.parametrize("kind", ["5b", "1.5-5b"])
def test_the_number_of_tokens_is_that_of_a_real_model(tiny_models, kind):
    source = ModelSource(str(tiny_models(kind)))
    vae = source.load_vae(torch.float32, slicing=False, tiling=False)
    transformer = source.load_transformer(torch.float32)
    config = transformer.config
    text = torch.zeros(1, config.max_text_seq_length, config.text_embed_dim)
    for num_frames in (1, 4, 5, 8, 9, 12, 13, 16, 17):
        with torch.no_grad():
            latents = vae.encode(torch.zeros(1, 3, num_frames, 32, 48)).latent_dist.mean.permute(0, 2, 1, 3, 4)
            embedded = transformer.patch_embed(text, pad_latent_frames(latents, config.patch_size_t))
        assert embedded.shape[1] == count_tokens(config, Bucket(num_frames, 32, 48))


class Evil:
    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("part", LOADERS)
def test_weights_that_would_run_code_are_refused(tiny_models, tmp_path, part):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    for file in (model / part).glob("*.safetensors*"):
        file.unlink()
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    (model / part / name).write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(UserError, match="cannot be loaded: ") as caught:
        LOADERS[part](ModelSource(str(model)), torch.float32)
    assert "weights_only" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_without_its_files_is_refused(tiny_models, tmp_path):
    source = ModelSource(str(shutil.copytree(tiny_models("5b"), tmp_path / "model")))
    shutil.rmtree(tmp_path / "model" / "tokenizer")
    for ask in (
        lambda: source.load_text_pipeline(torch.float32),
        lambda: source.find_long_captions([LONG_PROMPT], 226),
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
def test_the_native_size_is_that_of_the_config_except_for_positions_of_1_5(tiny_models, kind, latents, pixels):
    configs = ModelSource(str(tiny_models(kind))).configs()
    configs.transformer.update(sample_height=latents[0], sample_width=latents[1], sample_frames=81)
    assert configs.native_size == (81, *pixels)


def test_the_code_of_a_tokenizer_is_not_run(tiny_models, tmp_path):
    model = Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))
    config = json.loads((model / "tokenizer/tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (model / "tokenizer/tokenizer_config.json").write_text(json.dumps(config))
    (model / "tokenizer/evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    with pytest.raises(UserError, match=r"the tokenizer of the model .* cannot be loaded"):
        ModelSource(str(model)).find_long_captions(["a" * 300], 226)
    assert not (tmp_path / "ran").exists()
