"""Quantized weights are close to the original ones, compute and train like plain ones, and save memory."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import CogVideoXTransformer3DModel
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import cogvideox_text_to_video_lora
import generate
from common.errors import UserError
from forward_pass import predict
from memory.block_streaming import stream_blocks
from methods.lora import Lora
from models.encoding import encode_prompts
from models.prompts import PromptCache
from models.quantization import (
    FrozenLinear,
    check_quantization,
    compute_frozen,
    dequantize,
    describe_products,
    has_fp8_products,
    multiply_back,
)
from models.source import ModelSource
from tiny_runs import SIZE, assert_same_weights, train, weights_of
from tiny_steps import add_adapters, assert_same, inputs_of, train_step, with_adapters
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


def fp8_layer(source: ModelSource, dtype: torch.dtype = torch.bfloat16) -> FrozenLinear:
    """A layer that multiplies in fp8, which torch also does on a CPU."""
    layer = quantized_layer("fp8", source, dtype)
    compute_frozen(layer, in_fp8=True)
    assert layer.in_fp8
    return layer


def model_in_bfloat16(source: ModelSource, quantization: str, *, in_fp8: bool = False) -> CogVideoXTransformer3DModel:
    model = source.load_transformer(torch.bfloat16, quantize=quantization)
    add_adapters(model, dropout=0.0)
    compute_frozen(model, in_fp8=in_fp8)
    return model


def rounded_to_fp8(matrix: torch.Tensor) -> torch.Tensor:
    """Round rows as described: the largest number of a row becomes 448, numbers have 4 binary digits; in float64."""
    scales = (matrix.float().abs().amax(dim=1, keepdim=True) / 448).clamp(min=2**-126)
    quotients = (matrix.float() / scales).double()
    steps = 2.0 ** (quotients.abs().log2().floor().clamp(min=-6) - 3)
    return (quotients / steps).round() * steps * scales.double()


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_int8_is_dequantized_as_by_torchao(source, dtype):
    weight = quantized_layer("int8", source, dtype).weight
    assert torch.equal(dequantize(weight), weight.dequantize())


@pytest.mark.parametrize("quantization", ["int8", "fp8"])
def test_rows_of_zeros_stay_zero(source, tmp_path, quantization):
    model = source.load_transformer(torch.bfloat16)
    with torch.no_grad():
        model.transformer_blocks[0].ff.net[2].weight[3:5] = 0
    model.save_pretrained(tmp_path / "transformer")
    weight = quantized_layer(quantization, ModelSource(str(tmp_path)), torch.bfloat16).weight.dequantize()
    assert not weight[3:5].any() and weight.isfinite().all() and weight[:3].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_fp8_are_those_of_the_rounded_matrices(source, dtype):
    layer, generator = fp8_layer(source, dtype), torch.Generator().manual_seed(0)
    weight, scales = layer.weight.qdata.double(), layer.weight.scale.double()
    size = 10.0 ** torch.arange(-6, 0).view(2, 3, 1)  # each token has its own scale
    inputs = (torch.randn(2, 3, 512, generator=generator) * size).to(dtype).requires_grad_()
    outputs = layer(inputs)
    assert outputs.dtype == dtype
    expected = rounded_to_fp8(inputs.detach().flatten(end_dim=1)) @ (weight * scales).T + layer.bias.bfloat16()
    torch.testing.assert_close(outputs.double().flatten(end_dim=1), expected, rtol=2**-7, atol=1e-5)

    gradient = torch.randn(outputs.shape, generator=generator).to(dtype)
    outputs.backward(gradient)
    assert inputs.grad.dtype == dtype
    scaled = gradient.flatten(end_dim=1).bfloat16() * layer.weight.scale.T.bfloat16()
    expected = rounded_to_fp8(scaled) @ weight
    error = (inputs.grad.double().flatten(end_dim=1) - expected).abs()
    assert (error <= 2**-7 * expected.abs() + 2**-10 * expected.abs().max()).all()


def test_products_in_fp8_survive_zeros_and_show_infinities(source):
    layer = fp8_layer(source)
    inputs = torch.zeros(3, 512, dtype=torch.bfloat16)
    inputs[1] = 1
    inputs[2, 0] = torch.inf
    inputs.requires_grad_()
    outputs = layer(inputs)
    assert torch.equal(outputs[0], layer.bias)
    assert outputs[1].isfinite().all() and not outputs[2].isfinite().any()
    assert not torch.autograd.grad(outputs, inputs, torch.zeros_like(outputs))[0].any()


@pytest.mark.parametrize("sizes", [(64, 48), (64, 24), (24, 64)])
def test_only_half_precision_layers_of_sizes_that_gpus_multiply_are_in_fp8(sizes):
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    for dtype in (torch.bfloat16, torch.float32):
        layer = torch.nn.Linear(*sizes, bias=False, dtype=dtype)
        quantize_(layer, Float8WeightOnlyConfig(set_inductor_config=False))
        compute_frozen(layer, in_fp8=True)
        assert layer.in_fp8 == (dtype == torch.bfloat16 and sizes == (64, 48))
        assert layer(torch.ones(3, sizes[0], dtype=dtype)).shape == (3, sizes[1])


def test_gpus_accept_the_operands_of_both_products():
    """Torch checks sizes, strides and scales of fake tensors as on a GPU."""
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    with FakeTensorMode():
        layer = torch.nn.Linear(3072, 12288, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
        quantize_(layer, Float8WeightOnlyConfig(set_inductor_config=False))
        compute_frozen(layer, in_fp8=True)
        inputs = torch.empty(2, 17776, 3072, dtype=torch.bfloat16, device="cuda")
        outputs = layer(inputs)
        # Called itself, because torch's engine would look for a GPU.
        gradient = multiply_back(outputs.flatten(0, 1), layer.weight, in_fp8=True)
    assert outputs.shape == (2, 17776, 12288)
    assert gradient.shape == (2 * 17776, 3072) and gradient.dtype == inputs.dtype


def test_every_layer_that_sees_tokens_multiplies_in_fp8(source):
    model = model_in_bfloat16(source, "fp8", in_fp8=True)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, FrozenLinear)}
    assert {name for name, layer in layers.items() if not layer.in_fp8} == {
        name for name in layers if ".norm1." in name or ".norm2." in name
    }
    assert describe_products(model) == ", multiplied in fp8"
    assert describe_products(model_in_bfloat16(source, "fp8")) == ", multiplied in bfloat16"
    assert describe_products(model_in_bfloat16(source, "none")) == ""


def test_gradients_of_products_in_fp8_point_where_those_of_the_dequantized_weights_do(source):
    (_, expected), (_, gradients) = (
        train_step(model_in_bfloat16(source, "fp8", in_fp8=in_fp8)) for in_fp8 in (False, True)
    )
    cosines = [
        torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        for name, gradient in gradients.items()
    ]
    assert len(cosines) == 32
    assert min(cosines) > 0.95 and sum(cosines) / 32 > 0.975
    assert max(cosines) < 1


def test_a_hundred_steps_with_products_in_fp8_follow_those_in_bfloat16(source, one_thread):
    def losses(model: CogVideoXTransformer3DModel) -> torch.Tensor:
        """Learn to return the input."""
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        inputs, generator = inputs_of(model, 1, 4), torch.Generator().manual_seed(0)
        losses = []
        for _ in range(100):
            latents = torch.randn(inputs["hidden_states"].shape, generator=generator).bfloat16()
            output = model(**{**inputs, "hidden_states": latents}, return_dict=False)[0]
            loss = (output.float() - latents.float()).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
        return torch.stack(losses)

    expected = losses(model_in_bfloat16(source, "none"))
    assert expected[-20:].mean() < 0.8 * expected[:5].mean()
    error = (losses(model_in_bfloat16(source, "fp8", in_fp8=True)) / expected - 1).abs()
    assert 0 < error.mean() < 0.005 and error.max() < 0.03


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


@pytest.mark.parametrize(("quantization", "in_fp8"), [("int8", False), ("fp8", False), ("fp8", True)])
def test_checkpointing_does_not_change_the_gradients(source, quantization, in_fp8):
    model = model_in_bfloat16(source, quantization, in_fp8=in_fp8)
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


def test_products_in_fp8_use_streamed_weights(source):
    model = model_in_bfloat16(source, "fp8", in_fp8=True)
    expected = train_step(model)
    stream_blocks(model, CPU)
    assert_same(train_step(model), expected)


@pytest.mark.parametrize("in_fp8", [False, True])
def test_a_layer_compiles_without_graph_breaks(source, in_fp8):
    layer = fp8_layer(source) if in_fp8 else quantized_layer("int8", source, torch.float32)
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


def test_an_nf4_model_on_a_cpu_has_its_modulation_in_int8(source, plain):
    functional = pytest.importorskip("bitsandbytes").functional
    model = source.load_transformer(torch.bfloat16, quantize="nf4")
    weights = plain.state_dict()
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        weight, truth = layer.weight, weights[f"{name}.weight"]
        if ".norm1." in name or ".norm2." in name:
            assert weight.qdata.dtype == torch.int8
        elif name.startswith("transformer_blocks."):
            assert weight.nbytes == truth.numel() / 2
            error = (functional.dequantize_4bit(weight.data, weight.quant_state).float() - truth).abs().view(-1, 64)
            assert (error <= (ROUNDING["nf4"] + 2**-6) * truth.abs().view(-1, 64).amax(dim=1, keepdim=True)).all()
        else:
            assert torch.equal(weight, truth.bfloat16())
    with torch.no_grad():
        assert 0 < relative_error(predict(model, dtype=torch.bfloat16), predict(plain)) < 0.3
    assert describe_products(model) == ", multiplied in bfloat16"


def test_nf4_trains_validates_resumes_and_samples_on_a_cpu(tiny_models, prepared_demo, tmp_path, fresh_accelerator):
    pytest.importorskip("bitsandbytes")
    model = tiny_models("5b")
    flags = ["--load_tensors", "--report_to", "none", "--quantize_base", "nf4", "--max_train_steps", "3"]
    flags += ["--checkpointing_steps", "2", "--gradient_checkpointing", "--mixed_precision", "bf16"]
    flags += ["--validation_prompt", "a red circle", "--validation_steps", "1", "--num_inference_steps", "1"]
    script, data = cogvideox_text_to_video_lora, prepared_demo(*SIZE, "--max_samples", "2")
    once = train(script, model, data, tmp_path / "once", *flags)
    resumed = ["--resume_from_checkpoint", str(once / "checkpoint-2")]
    again = train(script, model, data, tmp_path / "again", *flags, *resumed)
    assert_same_weights(weights_of(again), weights_of(once))
    assert any(weight.any() for name, weight in weights_of(once).items() if "lora_B" in name)
    video = tmp_path / "video.mp4"
    where = ["--model_path", str(model), "--lora", str(once), "--quantize_base", "nf4", "--output_file", str(video)]
    size = ["--height", "32", "--width", "48", "--num_frames", "9", "--num_inference_steps", "1"]
    generate.main([*where, *size, "--prompt", "a red circle", "--dtype", "bf16"])
    assert video.stat().st_size


def test_a_missing_package_is_named(monkeypatch, source):
    monkeypatch.setattr("models.quantization.is_torchao_available", lambda: False)
    with pytest.raises(UserError, match=r"^--quantize_base fp8: .*pip install torchao"):
        check_quantization("fp8")
    with pytest.raises(UserError, match=r"^--quantize_base nf4: .*pip install torchao"):
        check_quantization("nf4")
    with pytest.raises(UserError, match=r"^--text_encoder_8bit: .*pip install torchao"):
        source.load_text_pipeline(torch.float32, in_8bit=True)


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


@pytest.mark.gpu
def test_products_in_fp8_on_a_gpu_are_those_of_a_cpu(source):
    if not has_fp8_products():
        pytest.skip("this GPU does not multiply in fp8")
    layer, generator = fp8_layer(source), torch.Generator().manual_seed(0)
    on_gpu = source.load_transformer(torch.bfloat16, device=torch.device("cuda"), quantize="fp8")
    on_gpu = on_gpu.transformer_blocks[0].ff.net[2]
    assert on_gpu.in_fp8
    inputs = torch.randn(2, 33, 512, generator=generator).bfloat16().requires_grad_()
    inputs_on_gpu = inputs.detach().cuda().requires_grad_()
    outputs, outputs_on_gpu = layer(inputs), on_gpu(inputs_on_gpu)
    outputs.square().sum().backward()
    outputs_on_gpu.square().sum().backward()
    assert relative_error(outputs_on_gpu.cpu(), outputs) < 0.01
    assert relative_error(inputs_on_gpu.grad.cpu(), inputs.grad) < 0.02
