"""A tuned transformer becomes a complete pipeline with copies of the components that its model's index names."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from PIL import Image
from transformers import T5EncoderModel

from common.errors import UserError
from diffusion.control_to_video import ControlToVideo
from diffusion.image_to_video import ImageToVideo
from methods.full import FullFinetune
from methods.pipeline_folder import find_components, write_pipeline
from models.source import ModelSource
from tuned_models import output


pytestmark = pytest.mark.usefixtures("one_thread")
PARTS = ["model_index.json", "scheduler", "text_encoder", "tokenizer", "transformer", "vae"]
SIZE = {"height": 32, "width": 48, "num_frames": 9}
COMMIT = "0123456789" * 4


def tuned(source: ModelSource) -> CogVideoXTransformer3DModel:
    transformer = source.load_transformer(torch.float32)
    with torch.no_grad():
        transformer.proj_out.weight.mul_(1.5)
    return transformer


def write_tuned(source: ModelSource, folder: Path) -> Path:
    return FullFinetune(save_pipeline=True).save(tuned(source), folder, torch.float32, source=source)


def sample(pipeline: CogVideoXPipeline | CogVideoXImageToVideoPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    image = {"image": Image.new("RGB", (48, 32), "red")} if pipeline.transformer.config.in_channels == 32 else {}
    generator = torch.Generator().manual_seed(0)
    return pipeline(
        prompt="a red circle", **image, **SIZE, num_inference_steps=2, generator=generator, output_type="latent"
    ).frames


def test_the_pipeline_of_another_task_has_its_classes_in_the_index(tiny_models, tmp_path):
    """The noise schedule stays that of the base model; the pipeline of controls steps only with DDIM."""
    source = ModelSource(str(tiny_models("5b")))
    index = {"_class_name": "CogVideoXFunControlPipeline", "scheduler": ["diffusers", "CogVideoXDDIMScheduler"]}
    transformer = tuned(source)
    ControlToVideo().prepare_model(transformer)
    method = FullFinetune(save_pipeline=True, index=index)
    folder = method.save(transformer, tmp_path, torch.float32, source=source)
    pipeline = DiffusionPipeline.from_pretrained(folder)
    assert isinstance(pipeline, CogVideoXFunControlPipeline)
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    assert torch.equal(pipeline.scheduler.alphas_cumprod, source.load_scheduler().alphas_cumprod)
    assert ModelSource(str(folder)).configs().is_control


def names(folder: Path) -> list[str]:
    return sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())


@pytest.fixture
def model(tiny_models, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_models("2b"), tmp_path / "model"))


@pytest.mark.parametrize(
    ("kind", "pipeline_class"), [("5b", CogVideoXPipeline), ("1.5-5b-i2v", CogVideoXImageToVideoPipeline)]
)
def test_the_pipeline_samples_with_the_tuned_transformer(tiny_models, tmp_path, kind, pipeline_class):
    source = ModelSource(str(tiny_models(kind)))
    transformer = tuned(source)
    folder = FullFinetune(save_pipeline=True).save(transformer, tmp_path, torch.float32, source=source)
    assert folder == tmp_path / "pipeline"
    assert (tmp_path / "transformer" / "config.json").is_file()
    base = pipeline_class.from_pretrained(tiny_models(kind))
    before = sample(base)
    base.transformer = transformer
    after = sample(pipeline_class.from_pretrained(folder))
    torch.testing.assert_close(after, sample(base), atol=1e-4, rtol=1e-4)
    assert (after - before).abs().max() > 0.1


def test_only_components_of_the_index_are_copied_and_no_hidden_files(model, tmp_path):
    (model / "notes").mkdir()
    for file in ("notes/a.txt", "README.md", "vae/.partial.bin", "vae/diffusion_pytorch_model.bin"):
        (model / file).touch()  # the last one is another form of the same weights
    folder = write_tuned(ModelSource(str(model)), tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == PARTS
    assert names(folder / "vae") == ["config.json", "diffusion_pytorch_model.safetensors"]
    for part in ("tokenizer", "text_encoder", "scheduler"):
        assert names(folder / part) == names(model / part)
        for name in names(model / part):
            assert (folder / part / name).read_bytes() == (model / part / name).read_bytes()
    assert (folder / "model_index.json").read_bytes() == (model / "model_index.json").read_bytes()


def test_a_part_that_the_index_omits_is_not_needed(model):
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"vae": [None, None]}))
    shutil.rmtree(model / "vae")
    found = {target.split("/")[0] for target in find_components(ModelSource(str(model))).values()}
    assert found == {"model_index.json", "scheduler", "text_encoder", "tokenizer"}


def test_the_links_of_a_hub_cache_become_files(tiny_models, tmp_path):
    cached = tmp_path / "cache" / "models--org--tiny"
    (cached / "blobs").mkdir(parents=True)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    for number, name in enumerate(names(tiny_models("2b"))):
        blob, link = cached / "blobs" / str(number), cached / "snapshots" / COMMIT / name
        shutil.copyfile(tiny_models("2b") / name, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(blob)
    folder = write_tuned(ModelSource("org/tiny", cache_dir=str(tmp_path / "cache")), tmp_path)
    assert not any(path.is_symlink() for path in folder.rglob("*"))
    shutil.rmtree(tmp_path / "cache")
    CogVideoXPipeline.from_pretrained(folder)


def test_a_variant_is_copied_under_plain_names(model, tmp_path):
    encoder = T5EncoderModel.from_pretrained(model / "text_encoder")
    with torch.no_grad():
        encoder.shared.weight.zero_()  # differs from the plain weights
    encoder.save_pretrained(model / "text_encoder", variant="fp16", max_shard_size="100KB")
    vae = model / "vae" / "diffusion_pytorch_model.safetensors"
    shutil.copyfile(vae, vae.with_suffix(".fp16.safetensors"))
    vae.unlink()
    assert any("fp16-00002" in name for name in names(model / "text_encoder"))
    source = ModelSource(str(model), variant="fp16")
    transformer = tuned(ModelSource(str(model)))
    folder = FullFinetune(save_pipeline=True).save(transformer, tmp_path, torch.float32, source=source)
    assert not any("fp16" in name for name in names(folder))
    pipeline = CogVideoXPipeline.from_pretrained(folder)
    assert not pipeline.text_encoder.shared.weight.any()
    assert torch.equal(pipeline.text_encoder.encoder.final_layer_norm.weight, encoder.encoder.final_layer_norm.weight)


@pytest.mark.parametrize(
    ("missing", "expected"),
    [("text_encoder", "no files in"), ("vae/diffusion_pytorch_model.safetensors", "no weights in")],
)
def test_a_missing_part_is_found_before_training(model, missing, expected):
    (model / missing).rename(model.parent / "removed")
    source = ModelSource(str(model))
    with pytest.raises(UserError, match=f"--save_pipeline: .* {expected}"):
        FullFinetune(save_pipeline=True).check_model(source.configs(), source)
    FullFinetune().check_model(source.configs(), source)


def test_a_missing_model_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"^--save_pipeline: the model 'nobody/nothing' cannot be downloaded: .*$"):
        find_components(ModelSource("nobody/nothing", cache_dir=str(tmp_path)))


def test_a_pipeline_replaces_an_earlier_one_completely_or_not_at_all(model, tmp_path):
    source = ModelSource(str(model))
    folder = write_tuned(source, tmp_path)
    (folder / "stale.txt").touch()
    with pytest.raises(UserError, match=r"--save_pipeline: .* cannot be written"):
        write_pipeline(source, tmp_path / "no-transformer", folder)
    assert (folder / "stale.txt").exists()
    write_pipeline(source, tmp_path / "transformer", folder)
    assert sorted(path.name for path in folder.iterdir()) == PARTS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pipeline", "transformer"]


def test_a_pipeline_without_learned_positions_samples_at_other_sizes(tiny_models, tmp_path):
    source = ModelSource(str(tiny_models("5b-i2v")))
    transformer = tuned(source)
    ImageToVideo(0.0, ignore_learned_positions=True).prepare_model(transformer)
    folder = FullFinetune(save_pipeline=True).save(transformer, tmp_path, torch.float32, source=source)
    pipeline = CogVideoXImageToVideoPipeline.from_pretrained(folder)
    assert pipeline.transformer.config.use_learned_positional_embeddings is False
    torch.testing.assert_close(output(pipeline.transformer), output(transformer), atol=1e-5, rtol=1e-5)
    assert sample(pipeline).shape == (1, 3, 16, 4, 6)
