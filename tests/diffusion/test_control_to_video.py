"""Control-to-video starts from the base model's own outputs, and passes the transformer what the pipeline passes."""

import json
import shutil

import pytest
import torch
from diffusers import CogVideoXDDIMScheduler, CogVideoXFunControlPipeline
from PIL import Image

from common.errors import UserError
from data.buckets import Bucket
from dataset import Batch
from diffusion.control_to_video import ControlToVideo
from forward_pass import load
from models.encoding import encode_prompts
from models.source import ModelSource
from tiny_steps import make_objective


KINDS = ["2b", "5b", "1.5-5b"]  # a convolution embeds the patches of the first two, a linear layer those of the last
SIZES = {"2b": Bucket(17, 64, 96), "5b": Bucket(13, 48, 80), "1.5-5b": Bucket(16, 64, 96)}


def with_pipeline(model, folder, name: str):
    """Return a copy of a model whose index names another pipeline."""
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text()) | {"_class_name": name}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_widened_model_predicts_exactly_what_its_base_does(tiny_models, kind):
    base, wide = load(tiny_models(kind)), load(tiny_models(kind))
    task, configs = ControlToVideo(), ModelSource(str(tiny_models(kind))).configs()
    task.prepare_model(wide)
    task.prepare_model(wide)  # a model that takes a control is left as it is
    widened = task.model_configs(configs)
    assert wide.config.in_channels == widened.transformer["in_channels"] == 32
    assert wide.patch_embed.proj.weight[0].numel() == widened.patch_inputs == 2 * configs.patch_inputs

    noisy, control = torch.randn(2, 1, 4, 16, 8, 12)
    inputs = {"encoder_hidden_states": torch.randn(1, 226, 64), "timestep": torch.tensor([500]), "return_dict": False}
    with torch.no_grad():
        expected = base(noisy, **inputs)[0]
        torch.testing.assert_close(wide(torch.cat([noisy, control], 2), **inputs)[0], expected, atol=1e-6, rtol=1e-6)
        wide.patch_embed.proj.weight[:, -1].normal_()
        assert not torch.allclose(wide(torch.cat([noisy, control], 2), **inputs)[0], expected, atol=1e-2)


def test_control_and_image_models_of_the_same_channels_are_told_apart_by_their_pipeline(tiny_models, tmp_path):
    image = ModelSource(str(tiny_models("5b-i2v"))).configs()
    assert (image.is_image_to_video, image.is_control) == (True, False)
    with pytest.raises(UserError, match=r"this is an image-to-video model .*cogvideox_image_to_video_lora\.py"):
        ControlToVideo().model_configs(image)
    folder = with_pipeline(tiny_models("5b-i2v"), tmp_path / "control", "CogVideoXFunControlPipeline")
    control = ModelSource(str(folder)).configs()
    assert (control.is_image_to_video, control.is_control) == (False, True)
    assert ControlToVideo().model_configs(control) is control


@pytest.mark.parametrize(("kind", "taken"), [("5b", [1, 5, 8, 9, 13, 16, 17]), ("1.5-5b", [8, 16])])
def test_the_frame_counts_taken_are_those_that_the_pipeline_samples_as_long_as_the_control(tiny_models, kind, taken):
    task, configs = ControlToVideo(), ModelSource(str(tiny_models(kind))).configs()
    refused = {1, 4, 5, 8, 9, 12, 13, 16, 17}.difference(taken)
    task.check_model(task.model_configs(configs), [Bucket(count, 64, 96) for count in taken])
    for count in refused:
        with pytest.raises(UserError, match=rf"--max_num_frames.*not {count}\b.*nearest are"):
            task.check_model(task.model_configs(configs), [Bucket(count, 64, 96)])


@pytest.mark.parametrize("is_prepared", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_training_and_sampling_pass_the_same_inputs_to_the_transformer(tiny_models, kind, is_prepared):
    size, source, task = SIZES[kind], ModelSource(str(tiny_models(kind))), ControlToVideo()
    pipeline = CogVideoXFunControlPipeline.from_pretrained(tiny_models(kind))
    exec("\n".join(task.usage()), {"pipe": pipeline, "torch": torch})
    pipeline.scheduler = CogVideoXDDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    transformer = source.load_transformer(torch.float32).eval()
    task.prepare_model(transformer)
    objective = make_objective(source, transformer, task=task)
    objective.vae = pipeline.vae

    pixels = torch.randint(256, (size.num_frames, size.height, size.width, 3), dtype=torch.uint8)
    controls = pixels.permute(0, 3, 1, 2)[None]
    normalized = controls.permute(0, 2, 1, 3, 4) / 127.5 - 1
    with torch.no_grad():
        moments = pipeline.vae.encode(normalized).latent_dist.parameters
    batch = Batch(
        ["a"],
        size,
        video_moments=torch.randn(1, 32, *size.latent_shape),
        **({"control_moments": moments} if is_prepared else {"controls": controls}),
        prompt_embeds=encode_prompts(pipeline, ["a red circle"]),
    )
    seen = []
    for network in (transformer, pipeline.transformer):
        network.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    with torch.no_grad():
        objective.losses(batch, torch.tensor([999]), [torch.Generator().manual_seed(7)])
    trained = seen[0]
    pipeline(
        prompt="a red circle",
        control_video=[Image.fromarray(frame) for frame in pixels.numpy()],
        height=size.height,
        width=size.width,
        guidance_scale=1,
        num_inference_steps=1,
        latents=trained["hidden_states"][:, :, :16],
        output_type="latent",
    )
    sampled = seen[1]
    torch.testing.assert_close(trained["hidden_states"], sampled["hidden_states"], rtol=1e-5, atol=1e-5)
    assert torch.equal(trained["encoder_hidden_states"], sampled["encoder_hidden_states"])
    for ours, theirs in zip(trained["image_rotary_emb"] or (), sampled["image_rotary_emb"] or (), strict=True):
        assert torch.equal(ours, theirs)
    assert transformer.state_dict().keys() == pipeline.transformer.state_dict().keys()
