"""A LoRA trains what it should, and reaches plain diffusers at the strength it was trained with."""

from pathlib import Path

import pytest
import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file

from methods import LORA_FILE, Lora
from models import ModelSource


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture
def transformer(tiny_models) -> CogVideoXTransformer3DModel:
    return ModelSource(str(tiny_models("2b"))).load_transformer(torch.float32)


def randomize(transformer: CogVideoXTransformer3DModel) -> None:
    """Give every second factor random values, as training would; they begin at zero."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in transformer.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 10)


@torch.no_grad()
def predict(transformer: CogVideoXTransformer3DModel) -> torch.Tensor:
    """The transformer's output for inputs that are always the same."""
    generator = torch.Generator().manual_seed(0)
    return transformer.eval()(
        hidden_states=torch.randn(2, 3, 16, 8, 12, generator=generator),
        encoder_hidden_states=torch.randn(2, 226, 64, generator=generator),
        timestep=torch.tensor([3, 700]),
        return_dict=False,
    )[0]


def sampled_with(model: Path, lora: Path) -> CogVideoXTransformer3DModel:
    """The transformer of a user who samples with plain diffusers."""
    pipeline = CogVideoXPipeline.from_pretrained(
        model, vae=None, text_encoder=None, tokenizer=None, dtype=torch.float32
    )
    pipeline.load_lora_weights(lora)
    return pipeline.transformer


def test_exactly_the_attentions_adapters_are_trainable_and_in_float32(tiny_models):
    transformer = ModelSource(str(tiny_models("5b"))).load_transformer(torch.bfloat16)
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


def test_an_untrained_lora_leaves_the_sampled_transformer_bit_for_bit_as_it_was(tiny_models, transformer, tmp_path):
    untouched = predict(transformer)
    lora = Lora(rank=4, alpha=4)
    lora.attach(transformer)
    lora.save(transformer, tmp_path, torch.float32)
    assert torch.equal(predict(sampled_with(tiny_models("2b"), tmp_path)), untouched)


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


def test_the_strength_is_alpha_over_rank(tiny_models, transformer, tmp_path):
    rank, alpha = 8, 4.0
    lora = Lora(rank, alpha)
    lora.attach(transformer)
    randomize(transformer)
    factors = load_file(lora.save(transformer, tmp_path, torch.float32))
    merged = ModelSource(str(tiny_models("2b"))).load_transformer(torch.float32)
    for name, down in factors.items():
        if name.endswith(".lora_A.weight"):
            up = factors[name.replace("lora_A", "lora_B")]
            layer = merged.get_submodule(name.removeprefix("transformer.").removesuffix(".lora_A.weight"))
            layer.weight.data += (alpha / rank * up.double() @ down.double()).float()
    torch.testing.assert_close(predict(transformer), predict(merged), atol=1e-4, rtol=1e-4)


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
    again = ModelSource(str(tiny_models("2b"))).load_transformer(torch.float32)
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
    ours = ModelSource(str(tiny_models("2b"))).load_transformer(torch.float32)
    lora.attach(ours)
    with pytest.raises(ValueError, match=LORA_FILE):
        lora.load(ours, tmp_path)


RELEASED = {"2b": {"num_attention_heads": 30, "num_layers": 30}, "5b": {"num_attention_heads": 48, "num_layers": 42}}


@pytest.mark.parametrize(
    ("kind", "in_transformer", "in_lora"),
    [("2b", 1_693_783_872, 29_491_200), ("5b", 5_570_283_072, 66_060_288)],
)
def test_the_released_models_have_as_many_parameters_as_published(kind, in_transformer, in_lora):
    with torch.device("meta"):
        transformer = CogVideoXTransformer3DModel(
            **RELEASED[kind],
            attention_head_dim=64,
            time_embed_dim=512,
            text_embed_dim=4096,
            use_rotary_positional_embeddings=kind == "5b",
        )
        assert sum(parameter.numel() for parameter in transformer.parameters()) == in_transformer
        Lora(rank=64, alpha=64).attach(transformer)
    trainable = [parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad]
    assert sum(trainable) == in_lora


def test_the_usage_names_the_model_and_the_folder(tmp_path):
    code = "\n".join(Lora(rank=4, alpha=4).usage("CogVideoXPipeline", "THUDM/CogVideoX-5b", tmp_path))
    compile(code, "usage", "exec")
    assert 'CogVideoXPipeline.from_pretrained("THUDM/CogVideoX-5b"' in code
    assert f'load_lora_weights("{tmp_path}")' in code
