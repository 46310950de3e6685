"""A method trains what it should, and its result reaches plain diffusers as it was trained."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    CogVideoXImageToVideoPipeline,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
)
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5EncoderModel

from common.errors import UserError
from diffusion.tasks import ImageToVideo
from methods.full import FullFinetune
from methods.lora import LORA_FILE, Lora
from models.configs import precision_warning
from models.source import ModelSource


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
PIPELINES = {"2b": CogVideoXPipeline, "5b-i2v": CogVideoXImageToVideoPipeline}


@pytest.fixture(autouse=True)
def one_thread():
    """Tensors are so small here that threads would only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def transformer(tiny_models) -> CogVideoXTransformer3DModel:
    return load(tiny_models("2b"))


def load(model: Path, dtype: torch.dtype = torch.float32) -> CogVideoXTransformer3DModel:
    return ModelSource(str(model)).load_transformer(dtype)


def randomize(transformer: CogVideoXTransformer3DModel) -> None:
    """Move everything trainable away from where it began, as training would."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) / 10)


@torch.no_grad()
def predict(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    """The transformer's output for inputs that are always the same."""
    generator = torch.Generator().manual_seed(0)
    return transformer.eval()(
        hidden_states=torch.randn(1, 5, transformer.config.in_channels, 8, 12, generator=generator),
        encoder_hidden_states=torch.randn(1, 226, 64, generator=generator),
        timestep=torch.tensor([700]),
        return_dict=False,
    )[0]


def sampled_with(model: Path, lora: Path, kind: str = "2b") -> CogVideoXTransformer3DModel:
    """The transformer of a user who samples with plain diffusers."""
    pipeline = PIPELINES[kind].from_pretrained(model, vae=None, text_encoder=None, tokenizer=None, dtype=torch.float32)
    pipeline.load_lora_weights(lora)
    return pipeline.transformer


def is_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def only_configs(model: Path, folder: Path) -> ModelSource:
    """The model without its weights: what is found in it is found before they are loaded."""
    shutil.copytree(model, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return ModelSource(str(folder))


# What a LoRA is


def test_exactly_the_attentions_adapters_are_trainable_and_in_float32(tiny_models):
    transformer = load(tiny_models("5b"), torch.bfloat16)
    Lora(rank=4, alpha=4).attach(transformer)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"transformer_blocks.{block}.attn1.{module}.lora_{factor}.default.weight"
        for block in range(4)
        for module in ATTENTION
        for factor in "AB"
    }
    for name, parameter in transformer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in trainable else torch.bfloat16)


def test_an_adapter_has_the_rank_asked_for_and_begins_without_effect(transformer):
    untouched = predict(transformer)
    Lora(rank=3, alpha=6).attach(transformer)
    query = transformer.transformer_blocks[0].attn1.to_q
    assert query.lora_A["default"].weight.shape == (3, 128)
    assert query.lora_B["default"].weight.shape == (128, 3)
    assert torch.equal(predict(transformer), untouched)


OPTIONS = {
    "plain": {},
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


@pytest.mark.parametrize(("kind", "options"), EXPORTS.values(), ids=EXPORTS)
def test_an_untrained_lora_leaves_the_sampled_transformer_bit_for_bit_as_it_was(tiny_models, tmp_path, kind, options):
    transformer = load(tiny_models(kind))
    untouched = predict(transformer)
    lora = Lora(rank=4, alpha=8, **options)
    lora.attach(transformer)
    assert torch.equal(predict(transformer), untouched)
    lora.save(transformer, tmp_path, torch.float32)
    assert torch.equal(predict(sampled_with(tiny_models(kind), tmp_path, kind)), untouched)


@pytest.mark.parametrize(("kind", "options"), EXPORTS.values(), ids=EXPORTS)
def test_a_lora_is_sampled_as_it_was_trained(tiny_models, tmp_path, kind, options):
    transformer = load(tiny_models(kind))
    untouched = predict(transformer)
    lora = Lora(rank=4, alpha=8, **options)
    lora.attach(transformer)
    randomize(transformer)
    trained = predict(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    sampled = predict(sampled_with(tiny_models(kind), tmp_path, kind))
    torch.testing.assert_close(sampled, trained, atol=1e-5, rtol=1e-5)
    assert (trained - untouched).norm() > 0.01 * untouched.norm()


@pytest.mark.parametrize(("rank", "alpha"), [(8, 4.0), (4, 16.0)])
def test_a_lora_samples_at_the_strength_it_was_trained_with(tiny_models, transformer, tmp_path, rank, alpha):
    untouched = predict(transformer)
    lora = Lora(rank, alpha)
    lora.attach(transformer)
    randomize(transformer)
    trained = predict(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    torch.testing.assert_close(predict(sampled_with(tiny_models("2b"), tmp_path)), trained, atol=1e-6, rtol=1e-6)
    assert (trained - untouched).norm() > 0.01 * untouched.norm()


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 4 / 8), (True, 4 / 8**0.5)], ids=["lora", "rslora"])
@pytest.mark.parametrize("use_dora", [False, True], ids=["", "dora"])
def test_the_strength_is_that_of_the_papers(tiny_models, transformer, tmp_path, use_rslora, scale, use_dora):
    lora = Lora(rank=8, alpha=4.0, use_rslora=use_rslora, use_dora=use_dora)
    lora.attach(transformer)
    randomize(transformer)
    factors = load_file(lora.save(transformer, tmp_path, torch.float32))
    merged = load(tiny_models("2b"))
    for name, down in factors.items():
        if name.endswith(".lora_A.weight"):
            up = factors[name.replace("lora_A", "lora_B")]
            layer = merged.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            weight = layer.weight.data.double() + scale * up.double() @ down.double()
            if use_dora:
                magnitude = factors[name.replace("lora_A.weight", "lora_magnitude_vector")].double()
                weight *= (magnitude / weight.norm(dim=1))[:, None]
            layer.weight.data = weight.float()
    torch.testing.assert_close(predict(transformer), predict(merged), atol=1e-4, rtol=1e-4)


def test_dropout_is_there_in_training_only(transformer):
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
    Lora(rank=2, alpha=2, target_modules=["all-linear"]).attach(transformer)
    trainable = {name for name, parameter in transformer.named_parameters() if parameter.requires_grad}
    assert {name.split(".lora_")[0] for name in trainable} == expected
    assert len(expected) == len(blocks) * 8


def test_dora_begins_without_effect_on_a_base_in_half_precision(tiny_models):
    transformer = load(tiny_models("2b"), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        untouched = predict(transformer)
        Lora(rank=4, alpha=4, use_dora=True).attach(transformer)
        assert torch.equal(predict(transformer), untouched)


def test_a_resumed_lora_must_have_the_same_adapters():
    lora = Lora(rank=4, alpha=8, target_modules=["to_v", "to_q"], use_dora=True, dropout=0.1, start_from=Path("a"))
    assert json.loads(json.dumps(lora.settings)) == {
        "--rank": 4,
        "--lora_alpha": 8,
        "--lora_target_modules": "to_q to_v",
        "--use_rslora": False,
        "--use_dora": True,
    }


@pytest.mark.parametrize("name", ["to_z", "attn1", "proj", "transformer_blocks.9.attn1.to_q", ""])
def test_a_target_that_is_no_linear_layer_is_found_before_weights_are_loaded(tiny_models, tmp_path, name):
    # A 2b has linear layers that end in proj, and a convolution, patch_embed.proj.
    source = only_configs(tiny_models("2b"), tmp_path / "model")
    lora = Lora(rank=4, alpha=4, target_modules=["to_q", name, "ff.net.2"])
    with pytest.raises(UserError) as caught:
        lora.check_model(source.configs(), source)
    message = str(caught.value)
    assert message.startswith(f"--lora_target_modules: {name}: ")
    assert "attn1.to_q, attn1.to_v" in message
    assert "norm_out.linear, patch_embed.text_proj, proj_out" in message


@pytest.mark.parametrize("kind", ["2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v"])
def test_good_targets_are_accepted_from_the_configs_alone(tiny_models, tmp_path, kind):
    source = only_configs(tiny_models(kind), tmp_path / "model")
    Lora(rank=4, alpha=4, **OPTIONS["all-linear"]).check_model(source.configs(), source)


# The file


def test_the_file_is_in_the_dtype_asked_for_and_needs_no_unpickling(transformer, tmp_path):
    lora = Lora(rank=4, alpha=4)
    lora.attach(transformer)
    file = lora.save(transformer, tmp_path, torch.bfloat16)
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    assert {weight.dtype for weight in load_file(file).values()} == {torch.bfloat16}
    with safe_open(file, "pt") as opened:
        assert "lora_adapter_metadata" in opened.metadata()
    assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]


def test_what_is_saved_is_loaded_bit_for_bit(tiny_models, transformer, tmp_path):
    lora = Lora(rank=4, alpha=4)
    lora.attach(transformer)
    randomize(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    again = load(tiny_models("2b"))
    lora.attach(again)
    lora.load(again, tmp_path)
    ours, theirs = transformer.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("rank", "modules"),
    [(4, [*ATTENTION, "ff.net.2"]), (4, ["norm1.linear"]), (4, ["to_q", "to_k"]), (8, [*ATTENTION])],
    ids=["more modules", "other modules", "fewer modules", "another rank"],
)
def test_a_file_with_other_adapters_is_refused(tiny_models, transformer, tmp_path, rank, modules):
    transformer.add_adapter(LoraConfig(r=rank, target_modules=modules))
    lora = Lora(rank=4, alpha=4)
    lora.save(transformer, tmp_path, torch.float32)
    ours = load(tiny_models("2b"))
    lora.attach(ours)
    with pytest.raises(ValueError, match=LORA_FILE):
        lora.load(ours, tmp_path)


def test_the_usage_names_the_model_and_the_folder(tmp_path):
    lines = Lora(rank=4, alpha=4).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", tmp_path, ["change(pipe)"])
    compile("\n".join(lines), "usage", "exec")
    assert lines[0].startswith('pipe = CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b"')
    assert lines[1:] == ["change(pipe)", f'pipe.load_lora_weights("{tmp_path}")']


# A quantized base


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "target_modules": [
                "all-linear",
            ],
            "use_dora": True,
        },
    ],
    ids=["lora", "dora"],
)
def test_a_lora_trained_on_a_quantized_base_is_one_of_the_plain_model(tiny_models, tmp_path, quantization, options):
    """Its file differs in nothing but values, and has on the plain model the effect that it would have there."""
    lora = Lora(rank=4, alpha=8, **options)
    files, changed = [], []
    for name in ("none", quantization):
        transformer = ModelSource(str(tiny_models("2b"))).load_transformer(torch.float32, quantize=name)
        untouched = predict(transformer)
        lora.attach(transformer)
        assert torch.equal(predict(transformer), untouched)
        randomize(transformer)
        files.append(lora.save(transformer, tmp_path / name, torch.bfloat16))
        changed.append(predict(transformer) - untouched)
    plain, quantized = (load_file(file) for file in files)
    assert {name: (w.shape, w.dtype) for name, w in plain.items()} == {
        name: (w.shape, w.dtype) for name, w in quantized.items()
    }
    with safe_open(files[0], "pt") as ours, safe_open(files[1], "pt") as theirs:
        assert ours.metadata() == theirs.metadata()
    sampled = predict(sampled_with(tiny_models("2b"), files[1].parent))
    effect = sampled - predict(load(tiny_models("2b")))
    assert (effect - changed[1]).norm() < 0.2 * changed[1].norm()
    assert changed[1].norm() > 0.01 * sampled.norm()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_a_quantized_base_starts_from_a_lora_and_resumes_as_a_plain_one(tiny_models, tmp_path, options):
    start = write_lora(tiny_models("2b"), tmp_path / "start", **options)
    source = ModelSource(str(tiny_models("2b")))
    lora = Lora(rank=4, alpha=8, start_from=start, quantize_base="int8", **options)
    lora.check_model(source.configs(), source)
    transformers = [source.load_transformer(torch.float32, quantize="int8") for _ in range(2)]
    lora.attach(transformers[0])
    assert is_equal(load_file(lora.save(transformers[0], tmp_path / "again", torch.float32)), load_file(start))
    randomize(transformers[0])
    lora.save(transformers[0], tmp_path / "checkpoint", torch.float32)
    lora.attach(transformers[1])
    lora.load(transformers[1], tmp_path / "checkpoint")
    assert torch.equal(predict(transformers[0]), predict(transformers[1]))


# A LoRA to start from


def write_lora(model: Path, folder: Path, dtype: torch.dtype = torch.float32, **options) -> Path:
    """A trained LoRA of rank 4 and alpha 8, where `options` do not say otherwise."""
    transformer = load(model)
    lora = Lora(**({"rank": 4, "alpha": 8} | options))
    lora.attach(transformer)
    randomize(transformer)
    return lora.save(transformer, folder, dtype)


def without_metadata(file: Path) -> Path:
    """As the original scripts wrote it."""
    save_file(load_file(file), file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("options", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_begin_with_exactly_the_values_of_the_file(tiny_models, transformer, tmp_path, dtype, options):
    file = write_lora(tiny_models("2b"), tmp_path / "first", dtype, **options)
    lora = Lora(rank=4, alpha=8, start_from=file, **options)
    source = ModelSource(str(tiny_models("2b")))
    lora.check_model(source.configs(), source)
    lora.attach(transformer)
    again = load_file(lora.save(transformer, tmp_path / "second", torch.float32))
    stored = load_file(file)
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name].float(), again[name]) for name in stored)
    assert {p.dtype for p in transformer.parameters() if p.requires_grad} == {torch.float32}


def test_a_checkpoint_loaded_after_the_start_wins(tiny_models, transformer, tmp_path):
    start = write_lora(tiny_models("2b"), tmp_path / "start")
    lora = Lora(rank=4, alpha=8, start_from=start)
    lora.attach(transformer)
    randomize(transformer)  # the training
    lora.save(transformer, tmp_path / "checkpoint", torch.float32)
    resumed = load(tiny_models("2b"))
    lora.attach(resumed)
    assert not is_equal(resumed.state_dict(), transformer.state_dict())
    lora.load(resumed, tmp_path / "checkpoint")
    assert is_equal(resumed.state_dict(), transformer.state_dict())


MISMATCHES = {
    "rank": ({"rank": 2}, {}, "give --rank 2"),
    "alpha": ({"alpha": 2.5}, {}, "give --lora_alpha 2.5"),
    "rslora": ({"use_rslora": True}, {}, "give --use_rslora"),
    "dora": ({"use_dora": True}, {}, "give --use_dora"),
    "no dora": ({}, {"use_dora": True}, "give no --use_dora"),
    "modules": ({"target_modules": ["proj_out", "ff.net.2"]}, {}, "give --lora_target_modules ff.net.2 proj_out"),
    "one block": (
        {"target_modules": ["transformer_blocks.1.attn1.to_q"]},
        {},
        "give --lora_target_modules transformer_blocks.1.attn1.to_q",
    ),
    "all": (
        {"rank": 2, "alpha": 3, "use_rslora": True, "target_modules": ["to_q"]},
        {},
        "give --rank 2, --lora_alpha 3, --use_rslora, --lora_target_modules attn1.to_q",
    ),
}


@pytest.mark.parametrize(("written", "given", "expected"), MISMATCHES.values(), ids=MISMATCHES)
def test_flags_that_contradict_the_file_are_listed_before_weights_are_loaded(
    tiny_models, tmp_path, written, given, expected
):
    file = write_lora(tiny_models("2b"), tmp_path / "lora", **written)
    source = only_configs(tiny_models("2b"), tmp_path / "model")
    lora = Lora(**({"rank": 4, "alpha": 8, "start_from": file} | given))
    with pytest.raises(UserError, match="--lora_weights") as caught:
        lora.check_model(source.configs(), source)
    assert str(caught.value).endswith(expected)


def test_the_flags_that_an_error_asks_for_are_the_right_ones(tiny_models, transformer, tmp_path):
    file = write_lora(tiny_models("2b"), tmp_path, target_modules=["to_q", "norm1.linear", "proj_out"])
    source = ModelSource(str(tiny_models("2b")))
    with pytest.raises(UserError) as caught:
        Lora(rank=4, alpha=8, start_from=file).check_model(source.configs(), source)
    asked_for = str(caught.value).split("--lora_target_modules ")[1].split()
    lora = Lora(rank=4, alpha=8, start_from=file, target_modules=asked_for)
    lora.check_model(source.configs(), source)
    lora.attach(transformer)
    sampled = predict(sampled_with(tiny_models("2b"), tmp_path))
    torch.testing.assert_close(predict(transformer), sampled, atol=1e-5, rtol=1e-5)


def test_without_metadata_rank_and_modules_are_found_from_the_tensors(tiny_models, tmp_path):
    file = without_metadata(write_lora(tiny_models("2b"), tmp_path, rank=2, alpha=99, target_modules=["to_q"]))
    source = ModelSource(str(tiny_models("2b")))
    with pytest.raises(UserError, match=r"give --rank 2, --lora_target_modules attn1\.to_q$"):
        Lora(rank=4, alpha=8, start_from=file).check_model(source.configs(), source)


@pytest.mark.parametrize("has_metadata", [False, True])
def test_an_alpha_that_the_file_does_not_know_is_warned_about(
    tiny_models, transformer, tmp_path, caplog, has_metadata
):
    file = write_lora(tiny_models("2b"), tmp_path)
    if not has_metadata:
        without_metadata(file)
    with caplog.at_level(logging.WARNING):
        Lora(rank=4, alpha=8, start_from=file).attach(transformer)
    warned = [record.message for record in caplog.records if record.name == "methods.lora"]
    assert len(warned) == (0 if has_metadata else 1)
    assert all("--lora_alpha 8 is taken" in line for line in warned)


def rename(name: str) -> str:
    return name.replace("transformer.", "unet.")


BROKEN = {
    "another model": (
        lambda w: {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in w.items()},
        "another model",
    ),
    "more blocks": (lambda w: {n.replace("blocks.3", "blocks.9"): t for n, t in w.items()}, "another model"),
    "another network": (lambda w: {rename(n): t for n, t in w.items()}, "no LoRA of a transformer"),
    "plain weights": (lambda w: {"transformer.proj_out.weight": torch.zeros(2)}, "no LoRA of a transformer"),
    "several ranks": (lambda w: {n: t[:2] if ".3.attn1.to_q.lora_A" in n else t for n, t in w.items()}, "different"),
    "half of them": (lambda w: {n: t for n, t in w.items() if "lora_A" in n}, "no flags describe"),
    "the other half": (lambda w: {n: t for n, t in w.items() if "lora_B" in n}, "different"),
}


@pytest.mark.parametrize(("change", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_no_flags_fit_is_refused(tiny_models, tmp_path, change, expected):
    file = write_lora(tiny_models("2b"), tmp_path)
    changed = {name: weight.contiguous() for name, weight in change(load_file(file)).items()}
    save_file(changed, file)
    source = ModelSource(str(tiny_models("2b")))
    with pytest.raises(UserError, match=expected) as caught:
        Lora(rank=4, alpha=8, start_from=file).check_model(source.configs(), source)
    assert str(caught.value).startswith("--lora_weights: ")


def test_a_damaged_file_is_refused(tiny_models, tmp_path):
    file = tmp_path / LORA_FILE
    file.write_bytes(b"not safetensors")
    source = ModelSource(str(tiny_models("2b")))
    with pytest.raises(UserError, match=r"--lora_weights: .* cannot be used"):
        Lora(rank=4, alpha=8, start_from=file).check_model(source.configs(), source)


# All weights


def in_dtype(transformer: CogVideoXTransformer3DModel, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: weight.to(dtype) for name, weight in transformer.state_dict().items()}


@pytest.mark.parametrize("kind", ["2b", "1.5-5b-i2v"])
def test_the_shards_of_a_fine_tuned_transformer_load_in_the_native_dtype(tiny_models, tmp_path, kind):
    source, method = ModelSource(str(tiny_models(kind))), FullFinetune(max_shard_size="1MB")
    transformer = source.load_transformer(method.base_dtype(torch.bfloat16))
    method.attach(transformer)
    randomize(transformer)
    native = method.result_dtype(torch.float16, source)
    folder = method.save_result(transformer, source, tmp_path, native)
    assert folder == tmp_path / "transformer"
    shards = {file.name: load_file(file) for file in folder.glob("*.safetensors")}
    assert len(shards) > 2
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, weights in shards.items() for name in weights}
    again, loaded = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values())
    assert again.dtype == native
    assert is_equal(again.state_dict(), in_dtype(transformer, native))
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


def test_a_full_checkpoint_is_loaded_bit_for_bit(tiny_models, transformer, tmp_path):
    method = FullFinetune(max_shard_size="1MB")
    method.attach(transformer)
    randomize(transformer)
    method.save(transformer, tmp_path, torch.float32)
    again = load(tiny_models("2b"))
    method.load(again, tmp_path)
    assert is_equal(again.state_dict(), transformer.state_dict())


def test_a_checkpoint_that_lacks_a_shard_or_is_of_another_model_is_refused(tiny_models, transformer, tmp_path):
    method = FullFinetune(max_shard_size="1MB")
    method.save(transformer, tmp_path, torch.float32)
    with pytest.raises(ValueError, match="another transformer"):
        method.load(load(tiny_models("5b-i2v")), tmp_path)
    min((tmp_path / "transformer").glob("*.safetensors")).unlink()
    with pytest.raises(ValueError, match=r"lacks \d+ weights"):
        method.load(transformer, tmp_path)


def test_dropped_learned_positions_stay_dropped(tiny_models, tmp_path):
    transformer = load(tiny_models("5b-i2v"))
    ImageToVideo(0.0, ignore_learned_positions=True).prepare_model(transformer)
    folder = FullFinetune().save(transformer, tmp_path, torch.float32)
    again, loaded = CogVideoXTransformer3DModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values())
    assert again.config.use_learned_positional_embeddings is False
    torch.testing.assert_close(predict(again), predict(transformer), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("save_pipeline", [False, True])
def test_the_usage_loads_what_was_written(tmp_path, save_pipeline):
    lines = FullFinetune(save_pipeline).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", tmp_path, ["change(pipe)"])
    compile("\n".join(lines), "usage", "exec")
    assert not any("change" in line for line in lines)  # the result has its own config
    where = f'"{tmp_path / "pipeline"}", ' if save_pipeline else f'"{tmp_path}", subfolder="transformer", '
    assert where in lines[0]
    # Whole pipelines are not uploaded.
    on_hub = FullFinetune(save_pipeline).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", "me/tuned")
    assert 'from_pretrained("me/tuned", subfolder="transformer", ' in on_hub[0]


# Precision


def test_fp16_for_a_model_in_bfloat16_is_warned_about_with_the_way_out():
    warning = precision_warning(torch.float16, torch.bfloat16)
    assert "black videos" in warning
    assert warning.endswith("use --mixed_precision bf16")


@pytest.mark.parametrize(
    ("compute_dtype", "native_dtype"),
    [
        (torch.float16, torch.float16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),
    ],
)
def test_other_precisions_are_fine(compute_dtype, native_dtype):
    assert precision_warning(compute_dtype, native_dtype) is None


# The released models, without their weights

LARGE = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
LARGE_1_5 = LARGE | {"patch_size_t": 2, "patch_bias": False, "sample_height": 300, "sample_width": 300}
LARGE_1_5 |= {"sample_frames": 81}
IMAGE = {"in_channels": 32}
RELEASED = {
    "2b": ({"num_attention_heads": 30, "num_layers": 30}, 1_693_783_872, 29_491_200),
    "5b": (LARGE, 5_570_283_072, 66_060_288),
    "5b-i2v": (LARGE | IMAGE | {"use_learned_positional_embeddings": True}, 5_570_479_680, 66_060_288),
    "1.5-5b": (LARGE_1_5, 5_570_676_352, 66_060_288),
    "1.5-5b-i2v": (LARGE_1_5 | IMAGE | {"ofs_embed_dim": 512}, 5_571_594_880, 66_060_288),
}


def count(module: torch.nn.Module, *, trainable: bool = False) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad or not trainable)


@pytest.mark.parametrize(("config", "in_transformer", "in_lora"), RELEASED.values(), ids=RELEASED)
def test_the_released_transformers_have_as_many_parameters_as_known(config, in_transformer, in_lora):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(
            attention_head_dim=64, time_embed_dim=512, text_embed_dim=4096, **config
        )
        assert count(transformer) == in_transformer
        FullFinetune().attach(transformer)
        assert count(transformer, trainable=True) == in_transformer
        Lora(rank=64, alpha=64).attach(transformer)
    assert count(transformer, trainable=True) == in_lora


def test_the_released_encoders_have_as_many_parameters_as_known():
    t5_v1_1_xxl = T5Config(
        vocab_size=32128,
        d_model=4096,
        d_kv=64,
        d_ff=10240,
        num_layers=24,
        num_heads=64,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        assert count(T5EncoderModel(t5_v1_1_xxl)) == 4_762_310_656
        vae = AutoencoderKLCogVideoX(
            block_out_channels=(128, 256, 256, 512), layers_per_block=3, latent_channels=16, norm_num_groups=32
        )
        assert count(vae) == 215_583_907
