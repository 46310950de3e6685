"""A LoRA trains the right weights and samples in plain diffusers as it was trained."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXFunControlPipeline, CogVideoXPipeline
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import convert_lora
from common.errors import UserError
from diffusion.control_to_video import ControlToVideo
from forward_pass import load
from methods.lora import LORA_FILE, Lora
from methods.lora_file import read_lora
from methods.lora_mounting import check_loras, mount_loras
from models.source import ModelSource
from tuned_models import check_model, make_lora, only_configs, output, randomize, sampled_with, write_lora


pytestmark = pytest.mark.usefixtures("one_thread")
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
OPTIONS = {
    "plain": {},
    "larger rank than alpha": {"rank": 8, "alpha": 4.0},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "feed-forward": {"target_modules": ["ff.net.0.proj", "ff.net.2"]},
    "around the blocks": {
        "target_modules": ["proj_out", "norm_out.linear", "norm1.linear", "text_proj", "time_embedding.linear_1"]
    },
    "all-linear": {"target_modules": ["all-linear"], "use_rslora": True, "use_dora": True, "dropout": 0.1},
}
EXPORTS = {name: ("2b", options) for name, options in OPTIONS.items()}
EXPORTS |= {f"image-to-video {name}": ("5b-i2v", OPTIONS[name]) for name in ("plain", "all-linear")}


def test_only_the_attentions_adapters_are_trainable_and_in_float32(tiny_models):
    transformer = load(tiny_models("5b")).to(torch.bfloat16)
    Lora(rank=3, alpha=6).attach(transformer)
    trainable = {name: weight for name, weight in transformer.named_parameters() if weight.requires_grad}
    assert {name: min(weight.shape) for name, weight in trainable.items()} == {
        f"transformer_blocks.{block}.attn1.{module}.lora_{factor}.default.weight": 3
        for block in range(4)
        for module in ATTENTION
        for factor in "AB"
    }
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trainable else torch.bfloat16)


@pytest.mark.parametrize(("kind", "options"), EXPORTS.values(), ids=EXPORTS)
def test_an_untrained_lora_has_no_effect_and_a_trained_one_samples_as_it_was_trained(
    tiny_models, tmp_path, kind, options
):
    transformer, lora = load(tiny_models(kind)), make_lora(**options)
    untouched = output(transformer)
    lora.attach(transformer)
    assert torch.equal(output(transformer), untouched)
    lora.save(transformer, tmp_path, torch.float32)
    assert torch.equal(output(sampled_with(tiny_models(kind), tmp_path, kind)), untouched)
    randomize(transformer)
    trained = output(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    torch.testing.assert_close(output(sampled_with(tiny_models(kind), tmp_path, kind)), trained, atol=1e-5, rtol=1e-5)
    assert (trained - untouched).norm() > 0.01 * untouched.norm()


@pytest.mark.parametrize("options", [{}, {"rank": 8, "alpha": 4.0, "use_rslora": True, "dropout": 0.1}], ids=str)
@pytest.mark.parametrize("kind", ["2b", "1.5-5b"])
def test_a_lora_of_a_control_is_one_on_the_widened_base_and_expresses_any_weights_of_the_control(
    tiny_models, tmp_path, kind, options
):
    model, task = tiny_models(kind), ControlToVideo()
    source = ModelSource(str(model))
    base, configs = source.configs(), task.model_configs(source.configs())
    transformer, lora = load(model), make_lora(new_inputs=base.patch_inputs, **options)
    lora.check_model(configs, source)
    task.prepare_model(transformer)
    untouched = output(transformer)
    lora.attach(transformer)
    assert torch.equal(output(transformer), untouched)
    projection = transformer.patch_embed.proj
    wanted = torch.randn(projection.weight[:, projection.weight.shape[1] // 2 :].shape) / 10
    with torch.no_grad():  # the second factor is these weights
        projection.lora_B["default"].weight.view(len(wanted), -1).copy_(wanted.flatten(1))
        change = projection.get_delta_weight("default")
    torch.testing.assert_close(change, torch.cat([torch.zeros_like(wanted), wanted], dim=1), atol=1e-6, rtol=1e-6)

    randomize(transformer)
    trained = output(transformer)
    file = lora.save(transformer, tmp_path, torch.float32)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = CogVideoXFunControlPipeline.from_pretrained(model, **parts, dtype=torch.float32)
    exec("\n".join(task.usage()), {"pipe": pipeline, "torch": torch})
    pipeline.load_lora_weights(tmp_path)
    torch.testing.assert_close(output(pipeline.transformer), trained, atol=1e-5, rtol=1e-5)
    merged = load(model)
    task.prepare_model(merged)
    for layer, factors in read_lora(file).factors():
        weight = merged.get_submodule(layer).weight
        weight.data = factors.added_to(weight)
    torch.testing.assert_close(output(merged), trained, atol=1e-4, rtol=1e-4)
    replace(lora, start_from=file).check_model(configs, source)


@pytest.mark.parametrize("kind", ["2b", "1.5-5b"])
def test_a_control_is_trained_from_a_lora_of_its_base(tiny_models, tmp_path, kind):
    model, task = tiny_models(kind), ControlToVideo()
    source = ModelSource(str(model))
    configs, inputs = task.model_configs(source.configs()), source.configs().patch_inputs
    file = write_lora(model, tmp_path)
    expected = sampled_with(model, tmp_path, "2b")
    task.prepare_model(expected)
    lora, transformer = make_lora(new_inputs=inputs, start_from=file), load(model)
    lora.check_model(configs, source)
    task.prepare_model(transformer)
    lora.attach(transformer)
    torch.testing.assert_close(output(transformer), output(expected), atol=1e-5, rtol=1e-5)
    down = transformer.patch_embed.proj.lora_A["default"].weight
    assert down.flatten(1)[:, inputs:].equal(torch.eye(inputs))
    with pytest.raises(UserError, match=r"trained with other flags; pass --rank 4$"):
        replace(lora, rank=8).check_model(configs, source)


def test_the_advice_on_a_lora_to_start_a_control_from_can_be_followed(tiny_models, tmp_path):
    model = tiny_models("5b")
    source = ModelSource(str(model))
    configs = ControlToVideo().model_configs(source.configs())

    def refused(file: Path) -> str:
        with pytest.raises(UserError, match=r"^--lora_weights: ") as caught:
            make_lora(new_inputs=64, start_from=file).check_model(configs, source)
        return str(caught.value)

    file = write_lora(model, tmp_path / "style", target_modules=["to_k", "proj_out"])
    modules = refused(file).split("pass --lora_target_modules ")[1].split()
    make_lora(new_inputs=64, start_from=file, target_modules=modules).check_model(configs, source)

    lokr, converted = write_lora(model, tmp_path / "lokr", adapter="lokr"), tmp_path / "converted.safetensors"
    assert "is a lokr, and a control starts only from a plain LoRA; make one of it with convert" in refused(lokr)
    convert_lora.main(["--lora", str(lokr), "--rank", "4", "--output_file", str(converted)])
    make_lora(new_inputs=64, start_from=converted, alpha=4).check_model(configs, source)

    merged, extracted, base = (
        str(tmp_path / "merged"),
        tmp_path / "extracted.safetensors",
        ["--model_path", str(model)],
    )
    dora = write_lora(model, tmp_path / "dora", use_dora=True)
    assert "was trained with --use_dora, and a control starts only from a plain LoRA; merge it" in refused(dora)
    convert_lora.main(["--lora", str(dora), *base, "--output_dir", merged])
    convert_lora.main(["--transformer", merged, *base, "--rank", "4", "--output_file", str(extracted)])
    make_lora(new_inputs=64, start_from=extracted, alpha=4).check_model(configs, source)


def test_a_lora_of_the_patch_embedding_without_a_control_is_told_from_one_of_another_model(tiny_models, tmp_path):
    source = ModelSource(str(tiny_models("1.5-5b")))
    style = write_lora(tiny_models("1.5-5b"), tmp_path / "style", target_modules=["to_k", "patch_embed.proj"])
    control = write_lora(tiny_models("1.5-5b"), tmp_path / "control", new_inputs=128)
    configs, expected = ControlToVideo().model_configs(source.configs()), "not for the control that this model takes"
    with pytest.raises(UserError, match=f"--lora: .*{expected}; join it with the LoRA of the control"):
        check_loras([(str(style), 1.0)], configs)
    with pytest.raises(UserError, match=f"--lora_weights: .*{expected}"):
        make_lora(new_inputs=128, start_from=style).check_model(configs, source)
    with pytest.raises(UserError, match="trained on another model"):
        check_loras([(str(style), 1.0)], ModelSource(str(tiny_models("1.5-5b-i2v"))).configs())
    joined = str(tmp_path / "joined.safetensors")
    convert_lora.main(["--lora", str(control), str(style), "--output_file", joined])
    check_loras([(joined, 1.0)], configs)


@pytest.mark.parametrize(("options", "flag"), [({"use_dora": True}, "--use_dora"), ({"adapter": "loha"}, "--adapter")])
def test_new_inputs_are_learned_only_by_a_plain_lora(tiny_models, options, flag):
    source = ModelSource(str(tiny_models("2b")))
    configs = ControlToVideo().model_configs(source.configs())
    with pytest.raises(UserError, match=f"^{flag}.*omit the flag, or start from a control model"):
        make_lora(new_inputs=64, **options).check_model(configs, source)


PRODUCTS = {
    "lokr": {"adapter": "lokr"},
    "lokr of all layers, other factor": {"adapter": "lokr", "lokr_factor": 4, "target_modules": ["all-linear"]},
    "loha": {"adapter": "loha"},
}


@pytest.mark.parametrize("options", PRODUCTS.values(), ids=PRODUCTS)
def test_a_lokr_or_loha_samples_by_the_printed_code_and_mounted_as_it_was_trained(tiny_models, tmp_path, options):
    model = tiny_models("2b")
    transformer, lora = load(model), make_lora(**options)
    untouched = output(transformer)
    lora.attach(transformer)
    assert torch.equal(output(transformer), untouched)
    file = lora.save(transformer, tmp_path, torch.float32)
    with pytest.raises(UserError, match="has no effect"):
        check_loras([(str(file), 1.0)], ModelSource(str(model)).configs())
    randomize(transformer)
    trained = output(transformer)
    assert (trained - untouched).norm() > 0.01 * untouched.norm()
    lora.save(transformer, tmp_path, torch.float32)
    with pytest.raises(ValueError, match="LoRA"):  # why the printed code is needed
        sampled_with(model, tmp_path)
    code = "\n".join(lora.usage("CogVideoXPipeline", str(model), tmp_path)).replace("torch.bfloat16", "torch.float32")
    names = {"torch": torch, "CogVideoXPipeline": CogVideoXPipeline}
    exec(code.replace('.to("cuda")', ""), names)
    assert torch.equal(output(names["pipe"].transformer), trained)
    check_loras([(str(file), 1.0)], ModelSource(str(model)).configs())
    pipeline = CogVideoXPipeline.from_pretrained(model, vae=None, text_encoder=None, tokenizer=None)
    mount_loras(pipeline, [(str(file), 1.0)])
    torch.testing.assert_close(output(pipeline.transformer), trained, atol=1e-5, rtol=1e-5)
    resumed = load(model)
    lora.attach(resumed)
    lora.load(resumed, tmp_path)
    assert torch.equal(output(resumed), trained)


def test_a_lokr_is_refused_on_a_quantized_base_on_another_model_and_if_damaged(tiny_models, tmp_path):
    file = write_lora(tiny_models("2b"), tmp_path, adapter="lokr")
    configs = ModelSource(str(tiny_models("2b"))).configs()
    with pytest.raises(UserError, match=r"^--quantize_base int8: .*convert_lora\.py"):
        check_loras([(str(file), 1.0)], configs, quantize_base="int8")
    weights = load_file(file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    wider = {name: torch.cat([one, one], 1) if "w2_b" in name else one for name, one in weights.items()}
    fewer = {name: one for name, one in weights.items() if "w1" not in name}
    for changed, expected in ((wider, "another model"), (fewer, "damaged .*it lacks lokr_w1")):
        save_file(changed, file, metadata)
        with pytest.raises(UserError, match=f"^--lora: .*{expected}"):
            check_loras([(str(file), 1.0)], configs)
    save_file(weights, file)
    with pytest.raises(UserError, match="metadata without alpha"):
        check_loras([(str(file), 1.0)], configs)


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4 / 8), (True, 4 / 8**0.5)], ids=["lora", "rslora"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_the_strength_is_that_of_the_papers(model, transformer, tmp_path, use_rslora, scale, use_dora):
    lora = Lora(rank=8, alpha=4.0, use_rslora=use_rslora, use_dora=use_dora)
    lora.attach(transformer)
    randomize(transformer)
    factors = load_file(lora.save(transformer, tmp_path, torch.float32))
    merged = load(model)
    for name, down in factors.items():
        if name.endswith(".lora_A.weight"):
            up = factors[name.replace("lora_A", "lora_B")]
            layer = merged.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            weight = layer.weight.data.double() + scale * up.double() @ down.double()
            if use_dora:
                magnitude = factors[name.replace("lora_A.weight", "lora_magnitude_vector")].double()
                weight *= (magnitude / weight.norm(dim=1))[:, None]
            layer.weight.data = weight.float()
    torch.testing.assert_close(output(transformer), output(merged), atol=1e-4, rtol=1e-4)


def test_dropout_applies_in_training_only(transformer):
    Lora(rank=4, alpha=4, dropout=0.5).attach(transformer)
    randomize(transformer)
    query = transformer.transformer_blocks[0].attn1.to_q
    inputs = torch.ones(1, 128)
    assert not torch.equal(query.train()(inputs), query(inputs))
    assert torch.equal(query.eval()(inputs), query(inputs))


def test_all_linear_is_every_linear_layer_of_the_blocks(transformer):
    blocks = transformer.transformer_blocks
    expected = {
        f"transformer_blocks.{name}" for name, layer in blocks.named_modules() if isinstance(layer, torch.nn.Linear)
    }
    lora = Lora(rank=2, alpha=2, target_modules=["all-linear"])
    lora.attach(transformer)
    assert {name.split(".lora_")[0] for name in lora.weight_names(transformer)} == expected
    assert len(expected) == len(blocks) * 8


def test_dora_starts_without_effect_on_a_half_precision_base(transformer):
    transformer.to(torch.bfloat16)
    untouched = output(transformer, dtype=torch.bfloat16)
    make_lora(use_dora=True).attach(transformer)
    assert torch.equal(output(transformer, dtype=torch.bfloat16), untouched)


def test_a_resumed_lora_must_have_the_same_adapters():
    lora = Lora(rank=4, alpha=8, target_modules=["to_v", "to_q"], use_dora=True, dropout=0.1, start_from=Path("a"))
    settings = {"--rank": 4, "--lora_alpha": 8, "--lora_target_modules": "to_q to_v"}
    # False is what a checkpoint older than a flag was made with.
    settings |= {"--use_rslora": False, "--use_dora": True, "--adapter": False, "--lokr_factor": False}
    assert json.loads(json.dumps(lora.settings)) == settings
    lokr = Lora(rank=4, alpha=8, adapter="lokr", lokr_factor=4).settings
    assert (lokr["--adapter"], lokr["--lokr_factor"]) == ("lokr", 4)


@pytest.mark.parametrize("name", ["to_z", "attn1", "proj", "transformer_blocks.9.attn1.to_q", ""])
def test_a_target_that_is_not_a_linear_layer_is_refused_before_weights_are_loaded(model, tmp_path, name):
    # A 2b has linear layers that end in proj, and a convolution, patch_embed.proj.
    lora = make_lora(target_modules=["to_q", name, "ff.net.2"])
    with pytest.raises(UserError) as caught:
        check_model(lora, only_configs(model, tmp_path / "model"))
    message = str(caught.value)
    assert message.startswith(f"--lora_target_modules: {name}: ")
    assert "attn1.to_q, attn1.to_v" in message
    assert "norm_out.linear, patch_embed.text_proj, proj_out" in message


@pytest.mark.parametrize("kind", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_good_targets_are_accepted_without_weights(tiny_models, tmp_path, kind):
    check_model(make_lora(**OPTIONS["all-linear"]), only_configs(tiny_models(kind), tmp_path / "model"))


def test_the_file_has_the_requested_dtype_and_metadata(transformer, tmp_path):
    lora = Lora(rank=4, alpha=4)
    lora.attach(transformer)
    file = lora.save(transformer, tmp_path, torch.bfloat16)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    assert {weight.dtype for weight in load_file(file).values()} == {torch.bfloat16}
    with safe_open(file, "pt") as opened:
        assert "lora_adapter_metadata" in opened.metadata()
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


@pytest.mark.parametrize(
    ("rank", "modules"),
    [(4, [*ATTENTION, "ff.net.2"]), (4, ["norm1.linear"]), (4, ["to_q", "to_k"]), (8, [*ATTENTION])],
    ids=["more modules", "other modules", "fewer modules", "another rank"],
)
def test_a_checkpoint_with_other_adapters_is_refused(model, transformer, tmp_path, rank, modules):
    transformer.add_adapter(LoraConfig(r=rank, target_modules=modules))
    lora = Lora(rank=4, alpha=4)
    lora.save(transformer, tmp_path, torch.float32)
    ours = load(model)
    lora.attach(ours)
    with pytest.raises(ValueError, match=LORA_FILE):
        lora.load(ours, tmp_path)


def test_the_usage_names_the_model_and_the_folder(tmp_path):
    lines = Lora(rank=4, alpha=4).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", tmp_path, ["change(pipe)"])
    compile("\n".join(lines), "usage", "exec")
    assert lines[0].startswith('pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b"')
    assert lines[1] == "change(pipe)"
    assert lines[2].startswith(f'pipe.load_lora_weights("{tmp_path}")  # applies alpha / rank, which set_adapters')


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["all-linear"], "use_dora": True}], ids=["lora", "all-linear dora"]
)
def test_a_lora_of_a_quantized_base_differs_only_in_its_values(model, tmp_path, quantization, options):
    lora = make_lora(**options)
    files, changed = [], []
    for name in ("none", quantization):
        transformer = ModelSource(str(model)).load_transformer(torch.float32, quantize=name)
        untouched = output(transformer)
        lora.attach(transformer)
        assert torch.equal(output(transformer), untouched)
        randomize(transformer)
        files.append(lora.save(transformer, tmp_path / name, torch.bfloat16))
        changed.append(output(transformer) - untouched)
    plain, quantized = ({name: (w.shape, w.dtype) for name, w in load_file(file).items()} for file in files)
    assert plain == quantized
    with safe_open(files[0], "pt") as ours, safe_open(files[1], "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    sampled = output(sampled_with(model, files[1].parent))
    assert (sampled - output(load(model)) - changed[1]).norm() < 0.2 * changed[1].norm()
    assert changed[1].norm() > 0.01 * sampled.norm()
