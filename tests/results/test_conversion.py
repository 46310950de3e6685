"""Converted LoRAs have the effect of what they were made of."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora
from forward_pass import load
from models.source import ModelSource
from tuned_models import make_lora, output, write_lora


pytestmark = pytest.mark.usefixtures("one_thread")
ALL = {"target_modules": ["all-linear"]}


@pytest.fixture
def model(tiny_models) -> Path:
    return tiny_models("5b")


@pytest.fixture
def convert(tmp_path) -> Callable[..., Path]:
    def run(*flags: object, to: str = "out.safetensors") -> Path:
        place = "--output_file" if to.endswith(".safetensors") else "--output_dir"
        convert_lora.main([*map(str, flags), place, str(tmp_path / to)])
        return tmp_path / to

    return run


def mounted(model: Path, *loras: Path, scales: tuple[float, ...] = ()) -> CogVideoXTransformer3DModel:
    """The transformer with LoRAs, by plain diffusers."""
    pipeline = CogVideoXPipeline.from_pretrained(model, vae=None, text_encoder=None, tokenizer=None)
    for number, lora in enumerate(loras):
        pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name, adapter_name=str(number))
    pipeline.set_adapters([str(number) for number in range(len(loras))], list(scales) or [1.0] * len(loras))
    return pipeline.transformer


def config_of(file: Path) -> dict:
    with safe_open(file, "pt") as opened:
        return json.loads(opened.metadata()["lora_adapter_metadata"])


def assert_close(one: CogVideoXTransformer3DModel, other: CogVideoXTransformer3DModel, tolerance=1e-5) -> None:
    torch.testing.assert_close(output(one), output(other), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("format", ["comfyui", "videox-fun"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"rank": 3, "alpha": 2, "use_rslora": True, **ALL}], ids=["", "all layers"])
def test_there_and_back_the_weights_are_bit_identical_and_as_strong(model, tmp_path, convert, format, dtype, options):
    file = write_lora(model, tmp_path / "lora", dtype, **options)
    there = convert("--lora", file, "--format", format, to="there.safetensors")
    back = convert("--lora", there, to="back.safetensors")
    before, after = load_file(file), load_file(back)
    assert before.keys() == after.keys() and not load_file(there).keys() & before.keys()
    assert all(
        torch.equal(weight, after[name]) and weight.dtype == after[name].dtype for name, weight in before.items()
    )
    rank, alpha = config_of(back)["transformer.r"], config_of(back)["transformer.lora_alpha"]
    assert (rank, alpha) == (3, pytest.approx(2 * 3**0.5)) if options else (4, 8)
    assert_close(mounted(model, back), mounted(model, file))


def test_a_videox_fun_file_is_that_of_its_rule(model, tmp_path, convert):
    file = write_lora(model, tmp_path, **ALL)
    weights, merged = load_file(convert("--lora", file, "--format", "videox-fun")), load(model)
    for layer, module in merged.named_modules():
        name = f"lora_unet__{layer.replace('.', '_')}"  # of its LoRANetwork, whose root module has an empty name
        if f"{name}.alpha" in weights:
            up, down = weights.pop(f"{name}.lora_up.weight"), weights.pop(f"{name}.lora_down.weight")
            module.weight.data += weights.pop(f"{name}.alpha").item() / up.shape[1] * up @ down
    assert not weights
    assert_close(merged, mounted(model, file))


def test_a_merged_lora_samples_as_both_mounted(model, tmp_path, convert):
    one = write_lora(model, tmp_path / "one", alpha=2)
    two = write_lora(model, tmp_path / "two", rank=3, use_rslora=True, target_modules=["to_q", "ff.net.2"])
    flags = ("--lora", one.parent, two, "--lora_scale", 0.5, -1)
    both = convert(*flags)
    ranks = {name.split(".")[4]: one.shape[0] for name, one in load_file(both).items() if "lora_A" in name}
    assert ranks == {"to_q": 7, "to_k": 4, "to_v": 4, "to_out": 4, "net": 3}
    expected = mounted(model, one, two, scales=(0.5, -1.0))
    assert_close(mounted(model, both), expected)
    assert_close(mounted(model, convert(*flags, "--rank", 8, to="8.safetensors")), expected)
    few = convert(*flags, "--rank", 4, "--dtype", "bf16", to="few.safetensors")
    assert {weight.dtype for weight in load_file(few).values()} == {torch.bfloat16}
    assert {min(weight.shape) for weight in load_file(few).values()} == {3, 4}
    assert not torch.allclose(output(mounted(model, few)), output(expected), atol=1e-4)


def tuned(model: Path, folder: Path, rank: int = 3) -> Path:
    """Full fine-tuning that changed two layers by a known rank."""
    transformer = load(model)
    generator = torch.Generator().manual_seed(0)
    for layer in (transformer.transformer_blocks[1].attn1.to_k, transformer.proj_out):
        left, right = (torch.randn(size, rank, generator=generator) / 10 for size in layer.weight.shape)
        layer.weight.data += left @ right.T
    transformer.save_pretrained(folder / "transformer")
    return folder


@pytest.mark.parametrize("size", ["--rank 3", "--rank 30", "--energy 0.9999999"])
def test_an_extracted_lora_of_a_known_rank_is_exact(model, tmp_path, convert, capsys, size):
    folder = tuned(model, tmp_path / "tuned")
    lora = convert("--transformer", folder, "--model_path", model, *size.split())
    assert len(load_file(lora)) == 4
    assert_close(mounted(model, lora), load(folder), 1e-4)
    assert "2 layers of rank" in capsys.readouterr().err


def test_an_extracted_lora_says_what_it_cannot_hold(model, tmp_path, convert, capsys):
    folder = tuned(model, tmp_path / "tuned", rank=6)
    transformer = load(folder)
    transformer.proj_out.bias.data += 1
    transformer.save_pretrained(folder / "transformer")
    flags = ("--transformer", folder, "--model_path", model)
    lora = convert(*flags, "--energy", 0.5)
    share = float(capsys.readouterr().err.split("it keeps ")[1].split("%")[0])
    pipeline = CogVideoXPipeline.from_pretrained(model, vae=None, text_encoder=None, tokenizer=None)
    pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
    pipeline.fuse_lora(components=["transformer"])
    pipeline.unload_lora_weights()
    missing, total = (
        sum(
            (transformer.get_parameter(name) - weight).square().sum().item()
            for name, weight in other.named_parameters()
        )
        for other in (pipeline.transformer, load(model))
    )
    assert share == pytest.approx(100 * (1 - missing / total), rel=1e-3)
    with pytest.raises(SystemExit):
        convert("--transformer", model, "--model_path", model, "--rank", 4, to="none.safetensors")
    assert "there is nothing to extract" in capsys.readouterr().err


KINDS = {
    "lora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "lokr": {"adapter": "lokr"},
    "loha": {"adapter": "loha"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_with_merged_adapters_samples_as_they_were_trained(model, tmp_path, convert, kind, capsys):
    lora = make_lora(**KINDS[kind], **ALL)
    file = write_lora(model, tmp_path / "lora", **KINDS[kind], **ALL)
    trained = ModelSource(str(model)).load_transformer(torch.float32)
    lora.attach(trained)
    lora.load(trained, file.parent)
    merged = load(convert("--lora", file, "--model_path", model, to="merged"))
    assert_close(merged, trained, 1e-4)
    assert [path.name for path in (tmp_path / "merged").iterdir()] == ["transformer"]
    if kind == "dora":
        with pytest.raises(SystemExit):
            convert("--lora", file)
        assert "trained with --use_dora" in capsys.readouterr().err
    else:
        assert_close(mounted(model, convert("--lora", file)), trained, 1e-4)


BROKEN = {
    "no metadata on its alpha": lambda weights: weights,
    "it holds transformer.proj_out.weight": lambda weights: weights | {"transformer.proj_out.weight": torch.ones(1)},
    "it holds lora_B.bias": lambda w: w | {next(iter(w)).split(".lora_")[0] + ".lora_B.bias": torch.ones(1)},
    "it lacks lora_B.weight": lambda weights: {name: one for name, one in weights.items() if "lora_B" not in name},
    "do not fit together": lambda weights: {n: one[:2] if "lora_A" in n else one for n, one in weights.items()},
    "NaN or infinite": lambda weights: {name: one * torch.nan for name, one in weights.items()},
}


@pytest.mark.parametrize("expected", BROKEN)
def test_a_file_that_would_be_converted_wrongly_is_refused(model, tmp_path, convert, capsys, expected):
    file = write_lora(model, tmp_path / "lora")
    with safe_open(file, "pt") as opened:
        metadata = None if "alpha" in expected else opened.metadata()
    save_file({name: one.contiguous() for name, one in BROKEN[expected](load_file(file)).items()}, file, metadata)
    with pytest.raises(SystemExit) as caught:
        convert("--lora", file)
    assert caught.value.code == 2 and expected in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


def test_files_of_other_models_are_refused(tiny_models, model, tmp_path, convert, capsys):
    file = write_lora(model, tmp_path / "lora", target_modules=["proj_out"])
    other = write_lora(tiny_models("1.5-5b"), tmp_path / "other", target_modules=["proj_out"])
    for flags, to, expected in (
        (("--lora", file, other), "out.safetensors", "proj_out has other sizes"),
        (("--lora", other, "--model_path", model), "merged", "its proj_out does not fit"),
        (
            ("--transformer", tiny_models("1.5-5b"), "--model_path", model, "--rank", 2),
            "o.safetensors",
            "another model",
        ),
    ):
        with pytest.raises(SystemExit) as caught:
            convert(*flags, to=to)
        assert caught.value.code == 2 and expected in capsys.readouterr().err
        assert not [*tmp_path.glob(f"*{to}*")]
