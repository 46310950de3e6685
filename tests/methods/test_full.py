"""A fully fine-tuned transformer loads in plain diffusers as it was trained."""

import json

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel
from safetensors.torch import load_file

from forward_pass import load
from methods.full import FullFinetune
from models.source import ModelSource
from tuned_models import randomize


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", ["2b", "1.5-5b-i2v"])
def test_the_shards_of_a_fine_tuned_transformer_load_in_the_native_dtype(tiny_models, tmp_path, kind):
    source, method = ModelSource(str(tiny_models(kind))), FullFinetune(max_shard_size="1MB")
    transformer = source.load_transformer(method.base_dtype(torch.bfloat16))
    method.attach(transformer)
    randomize(transformer)
    native = method.result_dtype(torch.float16, source)
    folder = method.save(transformer, tmp_path, native, source=source)
    assert folder == tmp_path / "transformer"
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(shards) > 2
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, weights in shards.items() for name in weights}
    again, loaded = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values())
    assert again.dtype == native
    trained = {name: weight.to(native) for name, weight in transformer.state_dict().items()}
    torch.testing.assert_close(again.state_dict(), trained, atol=0, rtol=0)
    ours, theirs = dict(again.config), dict(transformer.config)
    assert {name: ours[name] for name in ours if name[0] != "_"} == {n: theirs[n] for n in theirs if n[0] != "_"}


def test_a_smaller_result_leaves_no_shard_of_an_earlier_one(transformer, tmp_path):
    FullFinetune(max_shard_size="1MB").save(transformer, tmp_path, torch.float32)
    half_written = tmp_path / ".partial.transformer"
    half_written.mkdir()
    (half_written / "stale.safetensors").touch()
    FullFinetune().save(transformer, tmp_path, torch.float32)
    files = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    assert files == {"transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"}


def test_a_checkpoint_is_loaded_bit_for_bit(tiny_models, transformer, tmp_path):
    method = FullFinetune(max_shard_size="1MB")
    method.attach(transformer)
    randomize(transformer)
    method.save(transformer, tmp_path, torch.float32)
    again = load(tiny_models("2b"))
    method.load(again, tmp_path)
    torch.testing.assert_close(again.state_dict(), transformer.state_dict(), atol=0, rtol=0)


def test_a_checkpoint_that_lacks_a_shard_or_is_of_another_model_is_refused(tiny_models, transformer, tmp_path):
    method = FullFinetune(max_shard_size="1MB")
    method.save(transformer, tmp_path, torch.float32)
    with pytest.raises(ValueError, match="another transformer"):
        method.load(load(tiny_models("5b-i2v")), tmp_path)
    min((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        method.load(transformer, tmp_path)


@pytest.mark.parametrize("save_pipeline", [False, True])
def test_the_usage_loads_the_result(tmp_path, save_pipeline):
    lines = FullFinetune(save_pipeline).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", tmp_path, ["change(pipe)"])
    compile("\n".join(lines), "usage", "exec")
    assert not any("change" in line for line in lines)  # the result has its own config
    where = f'"{tmp_path / "pipeline"}", ' if save_pipeline else f'"{tmp_path}", subfolder="transformer", '
    assert where in lines[0]
    # Complete pipelines are not uploaded.
    on_hub = FullFinetune(save_pipeline).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", "me/tuned")
    assert 'from_pretrained("me/tuned", subfolder="transformer", ' in on_hub[0]
