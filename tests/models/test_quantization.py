"""Quantized weights are close to the original ones, compute and train like plain ones, and save memory."""

import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from forward_pass import predict
from methods.lora import Lora
from models.encoding import encode_prompts
from models.prompts import PromptCache
from models.quantization import FrozenLinear, check_quantization, compute_frozen
from models.source import ModelSource
from tiny_steps import assert_same, inputs_of, train_step, with_adapters
from validation.videos import _restored


CPU = torch.device("cpu")
# Half a step of the grid, relative to a row's largest weight: 1 / 255; a 4-bit significand; 16 levels.
ROUNDING = {"int8": 0.5 / 127, "fp8": 2**-4, "nf4": 0.16}


@pytest.fixture(scope="module")
def source(tiny_models) -> ModelSource:
    return ModelSource(str(tiny_models("5b")))


@pytest.fixture(scope="module")
def plain(source) -> CogVideoXTransformer3DModel:
    """Must not be changed."""
    return source.load_transformer(torch.float32)


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def quantized_layer(quantization: str, source: ModelSource, dtype: torch.dtype) -> FrozenLinear:
    return source.load_transformer(dtype, quantize=quantization).transformer_blocks[0].ff.net[2]


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_exactly_the_linear_layers_of_the_blocks_are_quantized(tiny_models, quantization):
    source = ModelSource(str(tiny_models("1.5-5b-i2v")))
    truth = source.load_transformer(torch.float32).state_dict()
    model = source.load_transformer(torch.bfloat16, quantize=quantization)
    quantized = {name for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    blocks = model.transformer_blocks.named_modules(prefix="transformer_blocks")
    assert quantized == {name for name, layer in blocks if isinstance(layer, torch.nn.Linear)}
    assert len(quantized) == 8 * len(model.transformer_blocks)
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") in quantized:
            largest = truth[name].abs().amax(dim=1, keepdim=True)
            error = (parameter.dequantize().float() - truth[name]).abs()
            # bfloat16 before and after adds two of its own roundings.
            assert (error <= (ROUNDING[quantization] + 2**-7) * largest).all()
            assert parameter.qdata.element_size() == 1
        else:
            assert torch.equal(parameter, truth[name].to(torch.bfloat16))


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.03), ("fp8", 0.15)])
def test_a_quantized_model_is_close_to_the_original(source, plain, quantization, most):
    with torch.no_grad():
        error = relative_error(predict(source.load_transformer(torch.float32, quantize=quantization)), predict(plain))
    assert 0 < error < most


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_a_layer_and_its_gradient_are_those_of_the_dequantized_weight(source, quantization):
    layer = quantized_layer(quantization, source, torch.float32)
    weight = layer.weight.dequantize().double()
    inputs = torch.randn(2, 3, 512, generator=torch.Generator().manual_seed(0), requires_grad=True)
    outputs = layer(inputs)
    expected = inputs.double() @ weight.T + layer.bias.double()
    torch.testing.assert_close(outputs.double(), expected, atol=1e-4, rtol=1e-4)
    outputs.square().sum().backward()
    expected = 2 * outputs.detach().double() @ weight
    torch.testing.assert_close(inputs.grad.double(), expected, atol=1e-4, rtol=1e-4)


def test_float16_does_not_overflow_if_the_result_does_not(source):
    layer = quantized_layer("int8", source, torch.float16)
    inputs = torch.sign(layer.weight.dequantize()[:1]) * 20  # all products of the first row are positive
    expected = inputs.double() @ layer.weight.dequantize().double().T + layer.bias.double()
    assert (inputs.double() @ layer.weight.qdata.double().T).max() > torch.finfo(torch.float16).max > expected.max()
    assert relative_error(layer(inputs), expected) < 0.01


def test_under_autocast_a_layer_computes_in_the_precision_of_the_model(source):
    layer = quantized_layer("int8", source, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.ones(1, 512)).dtype == torch.bfloat16  # norms give float32


def test_no_dequantized_weight_is_kept_for_the_backward_pass(source):
    model = source.load_transformer(torch.float32, quantize="int8")
    Lora(rank=4, alpha=4).attach(model)
    sizes = {layer.weight.shape for layer in model.modules() if isinstance(layer, FrozenLinear)}
    sizes |= {shape[::-1] for shape in sizes}
    kept = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if not hasattr(tensor, "qdata"):
            kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        predict(model)
    assert kept
    assert not sizes & set(kept)


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_checkpointing_does_not_change_the_gradients(source, quantization):
    model = with_adapters(source.path, quantize=quantization)
    expected = train_step(model)
    model.enable_gradient_checkpointing()
    assert_same(train_step(model), expected)
    assert len(expected[1]) == 4 * len(model.transformer_blocks) * 2


def test_a_checkpointed_layer_uses_its_current_weight_in_the_backward_pass(source):
    """Streamed weights are other tensors in the backward pass."""
    blocks = source.load_transformer(torch.float32, quantize="int8").transformer_blocks
    layer, other = blocks[0].ff.net[2], blocks[1].ff.net[2]
    inputs = torch.ones(1, 512, requires_grad=True)
    outputs = checkpoint(layer, inputs, use_reentrant=False)
    layer.weight = other.weight
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad[0], other.weight.dequantize().sum(dim=0))


def test_a_layer_compiles_without_graph_breaks(source):
    layer = quantized_layer("int8", source, torch.float32)
    inputs = torch.randn(2, 512, generator=torch.Generator().manual_seed(0), requires_grad=True)
    expected = torch.autograd.grad(layer(inputs).square().sum(), inputs)[0]
    layer.compile(backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(torch.autograd.grad(layer(inputs).square().sum(), inputs)[0], expected)


def test_ddp_accepts_a_quantized_model(source, tmp_path):
    model = with_adapters(source.path, quantize="int8")
    expected = train_step(model)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        assert_same(train_step(model, model=DistributedDataParallel(model)), expected)
    finally:
        torch.distributed.destroy_process_group()


def test_accelerate_and_validation_do_not_change_quantized_weights(source, fresh_accelerator):
    model = source.load_transformer(torch.bfloat16, quantize="int8")
    Lora(rank=4, alpha=4).attach(model)
    before = {name: (type(tensor), tensor.dtype, tensor.device) for name, tensor in model.named_parameters()}
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    with _restored(model):
        model.eval()
    assert {name: (type(t), t.dtype, t.device) for name, t in model.named_parameters()} == before
    train_step(model, model=prepared)
    assert all((p.grad is not None) == p.requires_grad for p in model.parameters())


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_nf4_is_refused_without_a_gpu_before_anything_is_loaded(source):
    for refused in (
        lambda: check_quantization("nf4"),
        lambda: Lora(rank=4, alpha=4, quantize_base="nf4").check_model(source.configs(), source),
        lambda: source.load_transformer(torch.float32, quantize="nf4"),
    ):
        with pytest.raises(UserError, match=r"^--quantize_base nf4: needs a GPU; .*int8"):
            refused()


def test_a_missing_package_is_named(monkeypatch, source):
    monkeypatch.setattr("models.quantization.is_torchao_available", lambda: False)
    with pytest.raises(UserError, match=r"^--quantize_base fp8: .*pip install torchao"):
        check_quantization("fp8")
    with pytest.raises(UserError, match=r"^--text_encoder_8bit: .*pip install torchao"):
        source.load_text_pipeline(torch.float32, in_8bit=True)


def test_runs_with_nf4_do_not_need_torchao(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao", None)
    monkeypatch.setitem(sys.modules, "torchao.utils", None)
    layers = torch.nn.Sequential(torch.nn.Linear(2, 2))
    compute_frozen(layers)
    assert type(layers[0]) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_8_bit_text_encoder_is_close_to_the_original(source, dtype):
    prompts = ["a red circle moves over a blue background", ""]
    pipeline = source.load_text_pipeline(dtype, in_8bit=True)
    layers = [layer for layer in pipeline.text_encoder.modules() if isinstance(layer, torch.nn.Linear)]
    assert all(isinstance(layer, FrozenLinear) and layer.weight.qdata.dtype == torch.int8 for layer in layers)
    # In float16 the end of each feed-forward layer computes in float32, as transformers does against overflow.
    wide = {layer.wo.weight.dtype for layer in pipeline.text_encoder.modules() if hasattr(layer, "wo")}
    assert wide == {torch.bfloat16 if dtype == torch.bfloat16 else torch.float32}
    embeds = encode_prompts(pipeline, prompts)
    assert embeds.dtype == dtype
    truth = encode_prompts(source.load_text_pipeline(torch.float32), prompts)
    assert 0 < relative_error(embeds, truth) < 0.03
    assert torch.cosine_similarity(embeds.float(), truth, dim=-1).min() > 0.999


def test_embeddings_of_the_8_bit_encoder_have_other_files(source, tmp_path):
    plain, in_8bit = (PromptCache(tmp_path, source, torch.float32, in_8bit=flag) for flag in (False, True))
    plain.embed(["a red circle"], CPU)
    in_8bit.embed(["a red circle"], CPU)
    assert len(list(tmp_path.iterdir())) == 2
    expected = encode_prompts(source.load_text_pipeline(torch.float32, in_8bit=True), ["a red circle"])[0]
    assert torch.equal(in_8bit.load("a red circle"), expected)
    assert not torch.equal(plain.load("a red circle"), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
def test_a_model_is_quantized_trained_and_saved_on_a_gpu(source, plain, tmp_path, fresh_accelerator, quantization):
    if quantization == "nf4":
        pytest.importorskip("bitsandbytes")
    accelerator = Accelerator(mixed_precision="bf16")
    check_quantization(quantization)
    model = source.load_transformer(torch.bfloat16, device=accelerator.device, quantize=quantization)
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    with torch.no_grad():
        output = predict(model, device=accelerator.device, dtype=torch.bfloat16)
    error = relative_error(output.cpu(), predict(plain).detach())
    assert 0 < error < {"int8": 0.05, "fp8": 0.15, "nf4": 0.4}[quantization]
    lora = Lora(rank=4, alpha=4)
    lora.attach(model)
    model.train().enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    losses = []
    for _ in range(5):
        output = prepared(**inputs_of(model), return_dict=False)[0]
        loss = output.float().square().mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with _restored(model):
        model.to("cpu")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    file = lora.save(model, tmp_path, torch.bfloat16)
    lora.attach(again := source.load_transformer(torch.float32))
    lora.load(again, Path(file).parent)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_nf4_computes_in_the_precision_of_the_model(source, dtype):
    pytest.importorskip("bitsandbytes")
    layer = source.load_transformer(dtype, device=torch.device("cuda"), quantize="nf4").transformer_blocks[0].ff.net[2]
    with torch.autocast("cuda", dtype):
        assert layer(torch.ones(1, 512, device="cuda")).dtype == dtype


@pytest.mark.gpu
def test_the_8_bit_text_encoder_runs_on_a_gpu(source):
    pipeline = source.load_text_pipeline(torch.bfloat16, device=torch.device("cuda"), in_8bit=True)
    truth = encode_prompts(source.load_text_pipeline(torch.float32), ["a red circle"])
    assert relative_error(encode_prompts(pipeline, ["a red circle"]).cpu(), truth) < 0.03
