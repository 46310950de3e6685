"""The tiny models: real folders of each released kind that load, sample and can be learned from."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, DiffusionPipeline
from PIL import Image
from transformers import AutoTokenizer

import make_tiny_model as module
from encoded_clips import all_frames
from make_tiny_model import KINDS, main, make_tiny_model


# Independent of KINDS: the published configs. Positions: "sincos", "rope" or "rope+learned".
PUBLISHED = {
    #             in_ch, positions, patch_size_t, ofs, scaling, invert, snr shift, pipeline
    "2b": (16, "sincos", None, False, 1.15258426, False, 3.0, "CogVideoXPipeline"),
    "5b": (16, "rope", None, False, 0.7, False, 1.0, "CogVideoXPipeline"),
    "5b-i2v": (32, "rope+learned", None, False, 0.7, False, 1.0, "CogVideoXImageToVideoPipeline"),
    "1.5-5b": (16, "rope", 2, False, 0.7, True, 1.0, "CogVideoXPipeline"),
    "1.5-5b-i2v": (32, "rope", 2, True, 0.7, True, 1.0, "CogVideoXImageToVideoPipeline"),
}
every_kind = pytest.mark.parametrize("kind", PUBLISHED)


def read_json(*parts: str | Path) -> dict:
    return json.loads(Path(*parts).read_text())


def file_bytes(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def read_clip(path: Path) -> torch.Tensor:
    """9 frames spread over a clip, at half its size and cut to 48 x 64: [1, 3, 9, 48, 64] in [-1, 1]."""
    frames = all_frames(path)
    frames = frames[np.linspace(0, len(frames) - 1, 9).astype(int), ::2, ::2]
    return torch.from_numpy(frames[:, :48, :64].copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def load_vae(folder: Path) -> AutoencoderKLCogVideoX:
    return AutoencoderKLCogVideoX.from_pretrained(folder, subfolder="vae")


@pytest.fixture(scope="module")
def clips(demo_clips) -> torch.Tensor:
    """[12, 3, 9, 48, 64]"""
    return torch.cat([read_clip(video) for video in sorted((demo_clips / "videos").iterdir())[:12]])


@every_kind
def test_the_configs_have_the_published_values(tiny_models, kind):
    assert set(KINDS) == set(PUBLISHED)
    in_channels, positions, patch_size_t, ofs, scaling, invert, shift, pipeline = PUBLISHED[kind]
    transformer = {"in_channels": in_channels, "out_channels": 16, "max_text_seq_length": 226, "patch_size": 2}
    transformer |= {"use_rotary_positional_embeddings": positions.startswith("rope"), "patch_size_t": patch_size_t}
    transformer |= {"use_learned_positional_embeddings": positions.endswith("learned")}
    transformer |= {"patch_bias": patch_size_t is None, "sample_frames": 17, "sample_height": 8, "sample_width": 12}
    vae = {"scaling_factor": scaling, "invert_scale_latents": invert, "latent_channels": 16}
    vae |= {"temporal_compression_ratio": 4}
    scheduler = {"_class_name": "CogVideoXDDIMScheduler" if kind == "2b" else "CogVideoXDPMScheduler"}
    scheduler |= {"snr_shift_scale": shift, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    scheduler |= {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "num_train_timesteps": 1000}
    scheduler |= {"rescale_betas_zero_snr": True, "clip_sample": False, "set_alpha_to_one": True}
    expected = {
        "transformer/config.json": transformer,
        "vae/config.json": vae,
        "scheduler/scheduler_config.json": scheduler,
        "model_index.json": {"_class_name": pipeline},
    }
    for file, values in expected.items():
        config = read_json(tiny_models(kind), file)
        assert {name: config[name] for name in values} == values
    assert (read_json(tiny_models(kind), "transformer/config.json")["ofs_embed_dim"] is not None) == ofs


@every_kind
def test_the_pipeline_loads_and_samples_9_frames(tiny_models, kind):
    folder = tiny_models(kind)
    assert sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) < 10e6
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert type(pipeline).__name__ == PUBLISHED[kind][-1]
    pipeline.set_progress_bar_config(disable=True)
    # The learned positions of 5b-i2v fit only the native size.
    height, width = (64, 96) if kind == "5b-i2v" else (32, 48)
    options = {"image": Image.new("RGB", (width, height), "red")} if kind.endswith("i2v") else {}
    options |= {"height": height, "width": width, "num_frames": 9, "num_inference_steps": 2, "output_type": "np"}
    video = pipeline(prompt="a red circle", generator=torch.Generator().manual_seed(0), **options).frames
    assert video.shape == (1, 9, height, width, 3)
    assert np.isfinite(video).all()
    assert video.std() > 0.01


def test_learned_positions_are_stored_for_the_native_size_and_are_not_the_computed_ones(tiny_models):
    from diffusers import CogVideoXTransformer3DModel

    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_models("5b-i2v"), subfolder="transformer")
    patch_embed = transformer.patch_embed
    assert patch_embed.pos_embedding.shape == (1, 226 + 5 * 4 * 6, 128)
    assert (patch_embed.pos_embedding - patch_embed._get_positional_embeddings(8, 12, 17)).std() > 0.05


def test_the_tokenizer_pads_and_cuts_to_226_as_t5_does(tiny_models):
    folder = tiny_models("5b")
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (0, 1, 2)
    assert tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 226

    def tokens(text: str) -> list[int]:
        return tokenizer(text, padding="max_length", max_length=226, truncation=True).input_ids

    assert tokens("") == [1] + [0] * 225
    short = tokens("a red circle, quickly!")
    length = short.index(1)
    assert (len(short), short[length:]) == (226, [1] + [0] * (225 - length))
    assert tokenizer.decode(short[:length]) == "a red circle, quickly!"
    long = tokens("word " * 300)
    assert (len(long), long[-1], 0 in long) == (226, 1, False)
    assert 2 in tokens("日本")
    caption = "a purple triangle moves from the top left to the bottom right over a plain dark green background"
    assert len(tokenizer(caption).input_ids) < 1.5 * len(caption.split())
    assert len(tokenizer) <= read_json(folder, "text_encoder", "config.json")["vocab_size"]


@pytest.mark.parametrize("kind", ["2b", "5b", "1.5-5b"])
def test_scaled_latents_are_of_order_one_and_posterior_noise_is_small(tiny_models, clips, kind):
    vae = load_vae(tiny_models(kind))
    with torch.no_grad():
        posterior = vae.encode(clips).latent_dist
    assert posterior.mean.shape == (12, 16, 3, 6, 8)
    latents = posterior.mean * vae.config.scaling_factor
    noise = posterior.std * vae.config.scaling_factor
    assert abs(latents.mean()) < 0.5
    assert 0.5 < latents.std() < 2
    assert latents.std(dim=(0, 2, 3, 4)).min() > 0.3
    assert 0.05 < noise.min() < noise.max() < 0.2


def test_latents_tell_the_clips_apart_and_decode_to_their_colours(tiny_models, clips):
    vae = load_vae(tiny_models("5b"))
    with torch.no_grad():
        latents = vae.encode(clips).latent_dist.mean
        shown = vae.decode(latents).sample
    # Variance shared by all clips at a place would come from the network, not from the clips.
    assert latents.var(dim=0).mean() > 0.8 * latents.var()
    assert shown.shape == clips.shape
    for clip, copy in zip(clips, shown, strict=True):
        assert 10 * torch.log10(4 / (clip - copy).square().mean()) > 16  # dB


@pytest.mark.parametrize("kind", ["2b", "5b"])
def test_the_output_depends_visibly_on_latents_text_and_timestep(tiny_models, kind):
    pipeline = DiffusionPipeline.from_pretrained(tiny_models(kind))
    captions = ["a red circle moves from left to right", "a blue square grows over a plain white background"]
    rope = pipeline._prepare_rotary_positional_embeddings(64, 96, 5, torch.device("cpu")) if kind == "5b" else None
    latents = torch.randn(2, 1, 5, 16, 8, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        texts = [pipeline.encode_prompt(caption, do_classifier_free_guidance=False)[0] for caption in captions]

        def predict(latents: torch.Tensor, text: torch.Tensor, timestep: int) -> torch.Tensor:
            return pipeline.transformer(
                latents, text, torch.tensor([timestep]), image_rotary_emb=rope, return_dict=False
            )[0]

        base = predict(latents[0], texts[0], 500)
        for sample, text, timestep in ((1, 0, 500), (0, 1, 500), (0, 0, 100)):
            assert (predict(latents[sample], texts[text], timestep) - base).std() > 0.1 * base.std()


def test_the_same_settings_give_the_same_bytes_and_another_seed_others(tiny_models, tmp_path):
    torch.manual_seed(1234)  # what the caller does with the global generator must not matter, nor be disturbed
    expected = torch.Generator().manual_seed(1234)
    again = make_tiny_model("2b", tmp_path / "again")
    assert torch.equal(torch.rand(3), torch.rand(3, generator=expected))
    assert file_bytes(again) == file_bytes(tiny_models("2b"))
    other = file_bytes(make_tiny_model("2b", tmp_path / "other", seed=1))
    for network in ("transformer/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert other[f"{network}.safetensors"] != file_bytes(again)[f"{network}.safetensors"]


def test_a_second_run_says_so_and_touches_nothing(tiny_models, monkeypatch, capsys):
    folder = tiny_models("2b")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", "--kind", "2b", "--output_dir", str(folder)])
    main()
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{folder}: tiny CogVideoX 2b")
    assert "transformer 1,247,424" in line
    assert "up to date" in line
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def run_and_fail(monkeypatch, capsys, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["make_tiny_model.py", *flags])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_a_tiny_model_with_other_settings_is_refused_as_well(tiny_models, monkeypatch, capsys):
    folder = tiny_models("2b")
    for flags in (("--kind", "5b"), ("--kind", "2b", "--seed", "1"), ("--kind", "2b", "--num_frames", "9")):
        assert "already holds" in run_and_fail(monkeypatch, capsys, *flags, "--output_dir", str(folder))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--height", "72"), "height 72 must be a multiple of 16"),
        (("--width", "0"), "width 0 must be a multiple of 16"),
        (("--num_frames", "16"), "num_frames 16 must be 4 k + 1"),
    ],
)
def test_an_impossible_native_size_is_one_line(tmp_path, monkeypatch, capsys, flags, message):
    flags = ("--kind", "5b", "--output_dir", str(tmp_path / "model"), *flags)
    assert message in run_and_fail(monkeypatch, capsys, *flags)


def test_help_and_errors_come_before_torch_is_imported():
    code = "import sys, make_tiny_model; sys.exit(bool({'torch', 'diffusers', 'transformers'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], cwd=Path(module.__file__).parent, check=True)
