"""Converted LoRAs have the effect of what they were made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    CogVideoXFunControlPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    DiffusionPipeline,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora
from args import parse_generate_args
from common.run_folder import CONFIG_TITLE
from diffusion.control_to_video import ControlToVideo
from forward_pass import load
from models.source import ModelSource
from results.generation import load_pipeline, settle
from results.trained_conditions import (
    TrainedConditions,
    find_trained_conditions,
    note_trained_conditions,
    takes_control,
)
from tuned_models import make_lora, output, write_lora
from video.frames import Cut


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


CONTROLLED = {
    "5b": {"new_inputs": 64},  # a convolution embeds the patches
    "1.5-5b": {"new_inputs": 128},  # a linear layer, which other LoRAs can change too
}


def controlled(model: Path, control: Path, style: Path | None = None) -> CogVideoXTransformer3DModel:
    """A base with a text-to-video LoRA in its weights, widened, and the LoRA of a control on it, by diffusers."""
    pipeline = CogVideoXPipeline.from_pretrained(model, vae=None, text_encoder=None, tokenizer=None)
    if style is not None:
        pipeline.load_lora_weights(str(style.parent), weight_name=style.name)
        pipeline.fuse_lora(components=["transformer"])
        pipeline.unload_lora_weights()
    ControlToVideo().prepare_model(pipeline.transformer)
    pipeline.load_lora_weights(str(control.parent), weight_name=control.name)
    return pipeline.transformer


@pytest.mark.parametrize("kind", CONTROLLED)
def test_the_lora_of_a_control_becomes_a_control_model_and_is_joined_with_loras_of_its_base(
    tiny_models, tmp_path, convert, kind, capsys
):
    model = tiny_models(kind)
    control = write_lora(model, tmp_path / "control", **CONTROLLED[kind])
    targets = ["to_k", "patch_embed.proj"] if kind == "1.5-5b" else ["to_k"]
    style = write_lora(model, tmp_path / "style", target_modules=targets)
    expected = controlled(model, control, style)

    joined = convert("--lora", style, control)
    assert_close(controlled(model, joined), expected)
    merged = convert("--lora", control, style, "--model_path", model, to="merged")
    pipeline = DiffusionPipeline.from_pretrained(merged)
    assert isinstance(pipeline, CogVideoXFunControlPipeline)
    assert isinstance(pipeline.scheduler, CogVideoXDDIMScheduler)
    assert_close(pipeline.transformer, expected, 1e-4)
    again = convert("--lora", style, "--model_path", convert("--lora", control, "--model_path", model, to="c"), to="a")
    assert_close(load(again), expected, 1e-4)

    small = convert("--lora", control, "--rank", 2, to="small.safetensors")
    ranks = {name.split(".lora_")[0]: len(one) for name, one in load_file(small).items() if "lora_A" in name}
    assert ranks.pop("transformer.patch_embed.proj") == CONTROLLED[kind]["new_inputs"] and {*ranks.values()} == {2}
    capsys.readouterr()
    foreign = convert("--lora", control, "--format", "comfyui", to="foreign.safetensors")
    assert "do not add its inputs to a base model; merge" in capsys.readouterr().err
    assert_close(controlled(model, convert("--lora", foreign, to="back.safetensors")), controlled(model, control))


def test_generate_samples_with_a_control_and_loras_of_its_base_as_with_the_merged_model(
    model, demo_clips, tmp_path, convert, recwarn
):
    control, style = (write_lora(model, tmp_path / str(inputs), new_inputs=inputs) for inputs in (64, 0))
    merged = convert("--lora", control, style, "--model_path", model, to="merged")
    clip = f"--prompt a --control {demo_clips}/videos/clip-000.mp4 --compute_control canny --num_frames 9"
    expected = controlled(model, control, style)
    for number, flags in enumerate((f"{model} --lora {control} {style}", f"{merged}")):
        settings = parse_generate_args(f"--model_path {flags} {clip} --output_dir {tmp_path / str(number)}".split())
        assert_close(load_pipeline(settle(settings), tuned=True).transformer, expected, 1e-4)
    assert not [warning for warning in recwarn if "peft_config" in str(warning.message)]


@pytest.mark.parametrize("kind", CONTROLLED)
def test_full_fine_tuning_with_a_control_becomes_its_lora(tiny_models, tmp_path, convert, kind):
    model = tiny_models(kind)
    folder = tuned(model, tmp_path / "tuned")
    transformer = load(folder)
    ControlToVideo().prepare_model(transformer)
    with torch.no_grad():
        transformer.patch_embed.proj.weight.add_(torch.randn_like(transformer.patch_embed.proj.weight) / 10)
    transformer.save_pretrained(folder / "transformer")
    lora = convert("--transformer", folder, "--model_path", model, "--rank", 3)
    assert_close(controlled(model, lora), transformer, 1e-4)


def test_a_base_of_another_task_and_one_without_all_parts_are_refused(tiny_models, model, tmp_path, convert, capsys):
    control, incomplete = write_lora(model, tmp_path / "control", new_inputs=64), tmp_path / "incomplete"
    shutil.copytree(model, incomplete, ignore=shutil.ignore_patterns("text_encoder"))
    for flags, to, expected in (
        (
            ("--transformer", tiny_models("5b-i2v"), "--model_path", model, "--rank", 2),
            "o.safetensors",
            "another model",
        ),
        (("--lora", control, "--model_path", incomplete), "merged", "--output_dir: the model has no files in"),
    ):
        with pytest.raises(SystemExit):
            convert(*flags, to=to)
        assert expected in capsys.readouterr().err and not [*tmp_path.glob(f"*{to}*")]


def refused(convert, capsys, *flags: object, to: str = "out.safetensors") -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        convert(*flags, to=to)
    return capsys.readouterr().err


def test_a_result_with_a_control_is_refused_on_a_base_that_it_was_not_trained_on(
    tiny_models, model, tmp_path, convert, capsys
):
    i2v, control = tiny_models("5b-i2v"), write_lora(model, tmp_path / "control", new_inputs=64)
    of_model = write_lora(model, tmp_path / "run")  # of a control model, by the config of its run
    transformer = tuned(i2v, tmp_path / "tuned")
    for run in (of_model.parent, transformer):
        note_trained_conditions(run, TrainedConditions(takes_control=True))
    extracted = ("--transformer", transformer, "--model_path", i2v, "--rank", 2)
    for to, flags in (("m", ("--lora", control)), ("m", ("--lora", of_model)), ("o.safetensors", extracted)):
        assert "image-to-video model, and" in refused(convert, capsys, *flags, "--model_path", i2v, to=to)
    message = refused(convert, capsys, "--lora", of_model, "--model_path", model, to="m")
    assert "was trained on a control model; pass that model" in message
    both = convert("--lora", of_model, control, "--model_path", model, to="both")

    style = write_lora(model, tmp_path / "style")
    note_trained_conditions(style.parent, TrainedConditions(cut=Cut(fps=8)))
    (both / "config.yaml").unlink()  # as of a control model from the hub
    assert takes_control(str(convert("--lora", style, "--model_path", both, to="again")))


def test_a_result_of_an_image_to_video_run_is_not_one_of_a_control(tiny_models, tmp_path, convert, capsys):
    lora = write_lora(tiny_models("1.5-5b-i2v"), tmp_path / "run", target_modules=["to_k", "patch_embed.proj"])
    note_trained_conditions(lora.parent, TrainedConditions())
    message = refused(convert, capsys, "--lora", lora, "--model_path", tiny_models("1.5-5b"), to="m")
    assert "was trained on another model: its patch_embed.proj does not fit" in message
    transformer = load(tiny_models("5b"))
    ControlToVideo().prepare_model(transformer)  # as image-to-video without learned positions leaves it, too
    transformer.save_pretrained(tmp_path / "run/transformer")
    flags = ("--transformer", tmp_path / "run", "--model_path", tiny_models("5b"), "--rank", 4)
    assert "tuned from another model: patch_embed.proj.weight is" in refused(convert, capsys, *flags)


def test_a_merge_reads_the_variant_and_remembers_the_frames_of_the_training(tiny_models, tmp_path, convert, capsys):
    model = Path(shutil.copytree(tiny_models("5b-i2v"), tmp_path / "model"))
    weights = model / "transformer/diffusion_pytorch_model.safetensors"
    lora = write_lora(model, tmp_path / "lora")
    expected = mounted(model, lora)
    weights.rename(weights.with_suffix(".fp16.safetensors"))
    (lora.parent / "config.yaml").write_text(f"# {CONFIG_TITLE}\ncondition_frames: first,last\n")
    merged = convert("--lora", lora, "--model_path", model, "--variant", "fp16", to="merged")
    assert_close(load(merged), expected)
    trained = (TrainedConditions("first,last"), str(merged))
    assert find_trained_conditions([str(merged)], str(model)) == trained
    convert("--lora", lora)
    assert "with generate.py --condition_frames first,last" in capsys.readouterr().err


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
