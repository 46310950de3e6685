"""A LoRA to start from is loaded exactly, and refused if it does not fit the model and the flags."""

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import UserError
from methods.lora import LORA_FILE
from models.source import ModelSource
from tuned_models import check_model, make_lora, only_configs, output, randomize, sampled_with, write_lora


pytestmark = pytest.mark.usefixtures("one_thread")
ADAPTERS = {"lora": {}, "dora": {"use_dora": True}}
PRODUCTS = {"lokr": {"adapter": "lokr"}, "loha": {"adapter": "loha"}}


def without_metadata(file: Path) -> Path:
    save_file(load_file(file), file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("options", (ADAPTERS | PRODUCTS).values(), ids=ADAPTERS | PRODUCTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapters_start_with_exactly_the_values_of_the_file(model, transformer, tmp_path, dtype, options):
    file = write_lora(model, tmp_path / "first", dtype, **options)
    lora = make_lora(start_from=file, **options)
    check_model(lora, model)
    lora.attach(transformer)
    again = load_file(lora.save(transformer, tmp_path / "second", torch.float32))
    stored = {name: weight.float() for name, weight in load_file(file).items()}
    torch.testing.assert_close(again, stored, atol=0, rtol=0)
    assert {weight.dtype for weight in transformer.parameters() if weight.requires_grad} == {torch.float32}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
@pytest.mark.parametrize("quantization", ["none", "int8"])
def test_a_lora_to_start_from_is_kept_and_a_checkpoint_overrides_it(model, tmp_path, quantization, options):
    start = write_lora(model, tmp_path / "start", **options)
    lora = make_lora(start_from=start, quantize_base=quantization, **options)
    check_model(lora, model)
    source = ModelSource(str(model))
    trained, resumed = (source.load_transformer(torch.float32, quantize=quantization) for _ in range(2))
    lora.attach(trained)
    again = load_file(lora.save(trained, tmp_path / "again", torch.float32))
    torch.testing.assert_close(again, load_file(start), atol=0, rtol=0)
    randomize(trained)  # the training
    checkpoint = lora.save(trained, tmp_path / "checkpoint", torch.float32)
    lora.attach(resumed)
    assert not torch.equal(output(resumed), output(trained))
    lora.load(resumed, tmp_path / "checkpoint")
    assert torch.equal(output(trained), output(resumed))
    loaded = load_file(lora.save(resumed, tmp_path / "loaded", torch.float32))
    torch.testing.assert_close(loaded, load_file(checkpoint), atol=0, rtol=0)


SEVERAL = {"rank": 2, "alpha": 3, "use_rslora": True, "target_modules": ["to_q"]}
MISMATCHES = {
    "--rank 2": {"rank": 2},
    "--lora_alpha 2.5": {"alpha": 2.5},
    "--use_rslora": {"use_rslora": True},
    "--use_dora": {"use_dora": True},
    "no --use_dora": {},
    "--lora_target_modules ff.net.2 proj_out": {"target_modules": ["proj_out", "ff.net.2"]},
    "--adapter lokr, --lokr_factor 4": {"adapter": "lokr", "lokr_factor": 4},
    "--adapter loha, --rank 2, --lora_alpha 2.5": {"adapter": "loha", "rank": 2, "alpha": 2.5},
    "--lora_target_modules transformer_blocks.1.attn1.to_q": {"target_modules": ["transformer_blocks.1.attn1.to_q"]},
    "--rank 2, --lora_alpha 3, --use_rslora, --lora_target_modules attn1.to_q": SEVERAL,
}


@pytest.mark.parametrize(("expected", "written"), MISMATCHES.items(), ids=MISMATCHES)
def test_flags_that_contradict_the_file_are_listed_before_weights_are_loaded(model, tmp_path, expected, written):
    file = write_lora(model, tmp_path / "lora", **written)
    lora = make_lora(start_from=file, use_dora=not written)
    with pytest.raises(UserError, match="--lora_weights") as caught:
        check_model(lora, only_configs(model, tmp_path / "model"))
    assert str(caught.value).endswith(f"; pass {expected}")


def test_the_listed_flags_are_sufficient(model, transformer, tmp_path):
    file = write_lora(model, tmp_path, target_modules=["to_q", "norm1.linear", "proj_out"])
    with pytest.raises(UserError) as caught:
        check_model(make_lora(start_from=file), model)
    lora = make_lora(start_from=file, target_modules=str(caught.value).split("--lora_target_modules ")[1].split())
    check_model(lora, model)
    lora.attach(transformer)
    torch.testing.assert_close(output(transformer), output(sampled_with(model, tmp_path)), atol=1e-5, rtol=1e-5)


def test_without_metadata_rank_and_modules_are_found_from_the_tensors(model, tmp_path):
    file = without_metadata(write_lora(model, tmp_path, rank=2, alpha=99, target_modules=["to_q"]))
    with pytest.raises(UserError, match=r"pass --rank 2, --lora_target_modules attn1\.to_q$"):
        check_model(make_lora(start_from=file), model)


@pytest.mark.parametrize("has_metadata", [False, True])
def test_an_unknown_alpha_is_warned_about(model, transformer, tmp_path, caplog, has_metadata):
    file = write_lora(model, tmp_path)
    if not has_metadata:
        without_metadata(file)
    with caplog.at_level(logging.WARNING):
        make_lora(start_from=file).attach(transformer)
    warned = [record.message for record in caplog.records if record.name == "methods.lora"]
    assert len(warned) == (0 if has_metadata else 1)
    assert all("--lora_alpha 8 is used" in line for line in warned)


BROKEN = {
    "another model": (
        lambda w: {n: torch.cat([t, t], 1) if "lora_A" in n else t for n, t in w.items()},
        "another model",
    ),
    "more blocks": (lambda w: {n.replace("blocks.3", "blocks.9"): t for n, t in w.items()}, "another model"),
    "another network": (lambda w: {n.replace("transformer.", "unet."): t for n, t in w.items()}, "not a LoRA of"),
    "plain weights": (lambda w: {"transformer.proj_out.weight": torch.zeros(2)}, "not a LoRA of a transformer"),
    "several ranks": (lambda w: {n: t[:2] if ".3.attn1.to_q.lora_A" in n else t for n, t in w.items()}, "different"),
    "half of them": (lambda w: {n: t for n, t in w.items() if "lora_A" in n}, "no flags describe"),
    "the other half": (lambda w: {n: t for n, t in w.items() if "lora_B" in n}, "different"),
}


@pytest.mark.parametrize(("change", "expected"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_no_flags_fit_is_refused(model, tmp_path, change, expected):
    file = write_lora(model, tmp_path)
    save_file({name: weight.contiguous() for name, weight in change(load_file(file)).items()}, file)
    with pytest.raises(UserError, match=f"^--lora_weights: .*{expected}"):
        check_model(make_lora(start_from=file), model)


def test_a_damaged_file_is_refused(model, tmp_path):
    file = tmp_path / LORA_FILE
    file.write_bytes(b"not safetensors")
    with pytest.raises(UserError, match=r"--lora_weights: .* cannot be used"):
        check_model(make_lora(start_from=file), model)
