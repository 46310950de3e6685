"""Our attention equals the library's, and backends that cannot run are refused."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from diffusers.models.attention_processor import CogVideoXAttnProcessor2_0
from torch.nn.attention import _registry, register_flash_attention_impl

from common.errors import UserError
from diffusion.positions import rotary_embeddings
from flags.speed import ATTENTION_BACKENDS
from forward_pass import gradients, load, predict
from models.attention import BACKENDS, DispatchedAttention, check_attention, set_attention, temporary_attention


CPU = torch.device("cpu")
KINDS = ("2b", "5b", "5b-i2v", "1.5-5b", "1.5-5b-i2v")


@pytest.mark.parametrize("kind", KINDS)
def test_native_attention_is_the_librarys_bit_for_bit(tiny_models, kind):
    transformer = load(tiny_models(kind))
    output, expected = predict(transformer), gradients(transformer)
    assert all(gradient.abs().sum() > 0 for name, gradient in expected.items() if ".to_q." in name)
    transformer.set_attn_processor(DispatchedAttention("native"))
    assert torch.equal(predict(transformer), output)
    ours = gradients(transformer)
    assert ours.keys() == expected.keys()
    norms = {name for name in ours if ".norm_q." in name or ".norm_k." in name}  # summed in another order
    assert [name for name in ours.keys() - norms if not torch.equal(ours[name], expected[name])] == []
    for name in norms:
        torch.testing.assert_close(ours[name], expected[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_native_attention_samples_in_half_precision_bit_for_bit(tiny_models):
    attention = load(tiny_models("5b")).to(torch.bfloat16).transformer_blocks[0].attn1
    generator = torch.Generator().manual_seed(0)
    video, text = (torch.randn(2, length, 128, generator=generator).bfloat16() for length in (120, 16))
    positions = rotary_embeddings(load(tiny_models("5b")), 5, 64, 96, CPU)
    expected = attention(video, text, image_rotary_emb=positions)
    attention.set_processor(DispatchedAttention("native"))
    assert all(map(torch.equal, attention(video, text, image_rotary_emb=positions), expected))


@torch.no_grad()
def test_positions_follow_the_size_of_each_batch(tiny_models):
    transformer = load(tiny_models("5b"))
    expected = [predict(transformer, frames) for frames in (5, 2, 5)]
    transformer.set_attn_processor(DispatchedAttention("native"))
    assert all(map(torch.equal, (predict(transformer, frames) for frames in (5, 2, 5)), expected))


def test_the_attention_of_training_is_restored_after_sampling(tiny_models):
    transformer = load(tiny_models("5b"))
    for backend, within in (("native", DispatchedAttention), (None, CogVideoXAttnProcessor2_0)):
        with pytest.raises(RuntimeError, match="sampling failed"), temporary_attention(transformer, backend):
            assert set(map(type, transformer.attn_processors.values())) == {within}
            raise RuntimeError("sampling failed")
        assert set(map(type, transformer.attn_processors.values())) == {CogVideoXAttnProcessor2_0}


def test_every_name_of_the_flag_is_known():
    assert tuple(BACKENDS) == ATTENTION_BACKENDS


@pytest.mark.parametrize("backend", ["flash", "cudnn", "flash-attn", "flash-attn-3", "flash-attn-4", "sage"])
def test_kernels_are_refused_on_a_cpu_and_in_float32(backend):
    with pytest.raises(UserError, match=f"^--attention_backend {backend}: needs a GPU.*use native$"):
        check_attention(backend, "--attention_backend", CPU, torch.bfloat16, 64, trains=True)
    with pytest.raises(UserError, match=f"^--attention_backend {backend}: .*half precision only; add --mixed_prec"):
        check_attention(backend, "--attention_backend", torch.device("cuda"), torch.float32, 64, trains=True)


@pytest.mark.parametrize(("backend", "module"), [("flash-attn", "flash_attn"), ("sage", "sageattention")])
def test_a_missing_package_is_named(backend, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed")
    with pytest.raises(UserError, match=f"^--flag {backend}: does not run here.*install `{module.replace('_', '-')}"):
        check_attention(backend, "--flag", torch.device("cuda"), torch.bfloat16, 64, trains=False)


@pytest.mark.parametrize("backend", ["flash-attn-3", "flash-attn-4"])
def test_packages_are_called_by_torch_which_has_their_gradient(tiny_models, backend):
    assert BACKENDS[backend] == BACKENDS["flash"]
    name, active = backend.upper().replace("FLASH-ATTN-", "FA"), torch.nn.attention.current_flash_attention_impl
    original, transformer = _registry._FLASH_ATTENTION_IMPLS[name], load(tiny_models("5b"))
    register_flash_attention_impl(name, register_fn=lambda: SimpleNamespace(remove=lambda: None))
    try:
        set_attention(transformer, backend)
        assert active() == name
        with temporary_attention(transformer, "native"):
            assert active() is None
        assert active() == name
        set_attention(transformer)
        assert active() is None
        with temporary_attention(transformer, backend):
            assert active() == name
        assert active() is None
    finally:
        register_flash_attention_impl(name, register_fn=original)


@pytest.mark.parametrize(("backend", "package"), [("flash-attn-3", "flash_attn_"), ("flash-attn-4", "flash-attn-4")])
def test_a_missing_implementation_is_named(backend, package):
    if importlib.util.find_spec("flash_attn") or importlib.util.find_spec("flash_attn_interface"):
        pytest.skip("FlashAttention is installed")
    with pytest.raises(UserError, match=f"^--flag {backend}: does not run here: the package {package}.*use another"):
        check_attention(backend, "--flag", torch.device("cuda"), torch.bfloat16, 64, trains=True)
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_only_a_backend_that_runs_here_passes():
    for backend in ("native", None):
        check_attention(backend, "--attention_backend", CPU, torch.float32, 64, trains=True)
    with pytest.raises(UserError, match=r"^--attention_backend efficient: needs a GPU"):
        check_attention("efficient", "--attention_backend", CPU, torch.bfloat16, 64, trains=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["native", "flash", "cudnn", "efficient"])
def test_torch_kernels_train_as_the_library_does(tiny_models, backend):
    device = torch.device("cuda")
    check_attention(backend, "--attention_backend", device, torch.bfloat16, 32, trains=True)
    transformer = load(tiny_models("5b")).to(device)
    options = {"device": device, "dtype": torch.bfloat16}
    output, expected = predict(transformer, **options), gradients(transformer, **options)
    set_attention(transformer, backend)
    ours = gradients(transformer, **options)
    assert torch.nn.functional.mse_loss(predict(transformer, **options), output) < 1e-3 * output.square().mean()
    for name, gradient in expected.items():
        assert (ours[name] - gradient).norm() <= 0.05 * gradient.norm(), name
