"""A LoRA has in ComfyUI the strength of its training, by the readers' own rules, which are written again here."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora
from common.run_folder import LORA_FILE
from doc_pages import flags_of, marked_blocks, noted_calls, read_page
from forward_pass import load
from tuned_models import write_lora


PAGE = read_page("assets/docs/comfyui.md")
OPTIONS = {
    "alpha of half the rank": {"rank": 8, "alpha": 4},
    "rsLoRA": {"rank": 4, "alpha": 6, "use_rslora": True},
    "all layers": {
        "rank": 3,
        "alpha": 2,
        "target_modules": [
            *("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "norm1.linear", "norm2.linear"),
            *("proj_out", "norm_out.linear", "text_proj", "patch_embed.proj", "time_embedding.linear_1"),
            *("time_embedding.linear_2", "ofs_embedding.linear_1", "ofs_embedding.linear_2"),
        ],
    },
}
# Layers of comfy/ldm/cogvideo/model.py -> those of diffusers.
COMFYUI_BLOCK = {
    **{"q": "attn1.to_q", "k": "attn1.to_k", "v": "attn1.to_v", "attn_out": "attn1.to_out.0"},
    **{
        "ff_proj": "ff.net.0.proj",
        "ff_out": "ff.net.2",
        "norm1.linear": "norm1.linear",
        "norm2.linear": "norm2.linear",
    },
}
COMFYUI_REST = {
    **{name: name for name in ("patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out")},
    **{f"{kind}_embedding_linear_{i}": f"{kind}_embedding.linear_{i}" for kind in ("time", "ofs") for i in (1, 2)},
}

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def lora(request, tiny_models, tmp_path) -> tuple[Path, Path]:
    """A model and a trained LoRA for it."""
    model = tiny_models("1.5-5b-i2v" if "target_modules" in request.param else "5b")
    return model, write_lora(model, tmp_path, **request.param)


def convert(lora: Path, output: Path) -> None:
    convert_lora.main(["--lora", str(lora), "--format", "comfyui", "--output_file", str(output)])


def merged_by_diffusers(model: Path, file: Path, strength: float) -> CogVideoXTransformer3DModel:
    """Load a LoRA with the calls of the wrapper's model loader."""
    pipeline = CogVideoXPipeline.from_pretrained(model, vae=None, text_encoder=None, tokenizer=None)
    rank = next(weight.shape[1] for name, weight in load_file(file).items() if "lora_B" in name)
    pipeline.load_lora_weights(str(file), weight_name=file.name, lora_rank=rank, adapter_name=file.name.split(".")[0])
    pipeline.set_adapters([file.name.split(".")[0]], adapter_weights=[strength])
    pipeline.fuse_lora(lora_scale=1, components=["transformer"])
    pipeline.unload_lora_weights()
    return pipeline.transformer


def add(transformer: CogVideoXTransformer3DModel, layer: str, up: torch.Tensor, down: torch.Tensor) -> None:
    weight = transformer.get_submodule(layer).weight.data
    weight += (up.double() @ down.double()).to(weight).reshape(weight.shape)


def assert_equal(transformer: CogVideoXTransformer3DModel, expected: CogVideoXTransformer3DModel) -> None:
    for (name, weight), other in zip(transformer.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(weight, other, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_wrapper_reads_the_file_at_the_strength_of_the_training(lora, strength):
    model, file = lora
    with safe_open(file, "pt") as opened:
        config = json.loads(opened.metadata()["lora_adapter_metadata"])
    rank, alpha = config["transformer.r"], config["transformer.lora_alpha"]
    scale = alpha / rank**0.5 if config["transformer.use_rslora"] else alpha / rank
    weights, expected = load_file(file), load(model)
    for name, up in weights.items():
        if "lora_B" in name:
            layer = name.removeprefix("transformer.").removesuffix(".lora_B.weight")
            add(expected, layer, strength * scale * up, weights[name.replace("lora_B", "lora_A")])
    assert_equal(merged_by_diffusers(model, file, strength), expected)
    # Before 0.34 diffusers did not read metadata: the page has the strength to pass.
    save_file(weights, file)
    assert_equal(merged_by_diffusers(model, file, strength * scale), expected)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_comfyui_reads_every_key_of_the_converted_file_at_the_strength_of_the_training(lora, tmp_path, strength):
    model, file = lora
    convert(tmp_path, tmp_path / "converted.safetensors")
    weights, merged = load_file(tmp_path / "converted.safetensors"), load(model)
    layers = {f"diffusion_model.{name}": layer for name, layer in COMFYUI_REST.items()} | {
        f"diffusion_model.blocks.{block}.{name}": f"transformer_blocks.{block}.{layer}"
        for block in range(len(merged.transformer_blocks))
        for name, layer in COMFYUI_BLOCK.items()
    }
    for name, layer in layers.items():
        if f"{name}.lora_B.weight" in weights:
            up, down = weights.pop(f"{name}.lora_B.weight"), weights.pop(f"{name}.lora_A.weight")
            scale = weights.pop(f"{name}.alpha").item() / down.shape[0]
            add(merged, layer, strength * scale * up.flatten(1), down.flatten(1))
    assert not weights
    assert_equal(merged, merged_by_diffusers(model, file, strength))


def test_what_comfyui_would_apply_wrongly_is_not_converted(tiny_models, tmp_path, capsys):
    output = tmp_path / "converted.safetensors"
    file = write_lora(tiny_models("5b"), tmp_path, use_dora=True)
    with pytest.raises(SystemExit):
        convert(file, output)
    assert "--use_dora" in capsys.readouterr().err
    save_file(load_file(file), file)
    with pytest.raises(SystemExit):
        convert(file, output)
    assert "no metadata on its alpha" in capsys.readouterr().err
    assert not output.exists()


def test_the_folder_of_the_converted_file_is_made(tiny_models, tmp_path):
    convert(write_lora(tiny_models("5b"), tmp_path), tmp_path / "new" / "converted.safetensors")
    assert (tmp_path / "new" / "converted.safetensors").is_file()


def test_the_command_of_the_page_converts_for_comfyui(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("outputs/my-lora").mkdir(parents=True)
    Path("outputs/my-lora", LORA_FILE).touch()
    blocks = marked_blocks(PAGE)
    assert blocks.keys() == {"convert"}
    (call,) = map(flags_of, noted_calls(blocks["convert"], tmp_path))
    assert (call.format, call.output_file) == ("comfyui", "my-style.safetensors")
