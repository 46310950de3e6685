"""How a run is started."""

import pytest
import torch
from accelerate.utils import AutocastKwargs
from diffusers import CogVideoXTransformer3DModel

from args import parse_args
from common.errors import UserError
from run.launch import start_accelerator


def test_fp8_in_the_accelerate_config_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    settings = parse_args(
        ["--pretrained_model_name_or_path", "a/b", "--data_root", "."], task="text-to-video", method="lora"
    )
    with pytest.raises(UserError, match="fp8, which is not supported; pass bf16"):
        start_accelerator(settings.training, settings.tracking, allow_tf32=False)


def test_autocast_without_cached_weights_computes_the_same(tiny_models, tmp_path, fresh_accelerator):
    (tmp_path / "data").mkdir()
    argv = ["--pretrained_model_name_or_path", str(tiny_models("5b")), "--data_root", str(tmp_path / "data")]
    argv += ["--output_dir", str(tmp_path / "out"), "--mixed_precision", "bf16", "--report_to", "none"]
    settings = parse_args(argv, task="text-to-video", method="sft")
    accelerator = start_accelerator(settings.training, settings.tracking, allow_tf32=False)
    assert accelerator.autocast_handler.cache_enabled is False
    computed = []
    for handler in (accelerator.autocast_handler, AutocastKwargs()):
        transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_models("5b"), subfolder="transformer")
        transformer.enable_gradient_checkpointing()
        latents = torch.randn(1, 5, 16, 8, 12, generator=torch.Generator().manual_seed(0))
        rotary = tuple(torch.ones(5 * 4 * 6, transformer.config.attention_head_dim) for _ in range(2))
        with accelerator.autocast(handler):
            prompt = torch.ones(1, 226, transformer.config.text_embed_dim)
            output = transformer(latents, prompt, torch.tensor([500]), image_rotary_emb=rotary).sample
            loss = output.float().square().mean()
        loss.backward()
        computed.append((loss, [parameter.grad for parameter in transformer.parameters()]))
    (loss, gradients), (cached_loss, cached_gradients) = computed
    assert torch.equal(loss, cached_loss)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(gradients, cached_gradients, strict=True))
