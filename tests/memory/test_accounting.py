"""The calculated memory equals that of real tensors, or of torch's fake ones for a GPU and full-size models."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXTransformer3DModel
from diffusers.configuration_utils import FrozenDict
from step_cost import StepCounter, fake_inputs, fake_model, gpu_like, on_meta
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from data.buckets import Bucket
from dataset import Batch
from diffusion.control_to_video import ControlToVideo
from diffusion.image_to_video import ImageToVideo
from diffusion.objective import Objective
from diffusion.task import Task
from diffusion.text_to_video import TextToVideo
from flags.optimizer import LOW_BITS, OptimizerFlags
from make_full_size_model import full_size_configs
from memory.accounting import MemoryAccount, account, state_bytes
from memory.activation_bytes import batch_bytes, block_tensors, decoding_bytes, encoding_bytes, sampling_bytes
from memory.activations import checkpoint_activations
from memory.facts import ModelFacts, Workload, model_facts
from memory.settings import GB, MemorySettings
from methods.full import FullFinetune
from methods.lora import Lora
from models.attention import set_attention
from models.configs import ModelConfigs
from models.encoding import encode_videos
from models.source import ModelSource
from optimizers.build import make_optimizer


NATIVE, SMALL = Bucket(49, 480, 720), Bucket(17, 64, 96)
LORA, FULL = Lora(64, 64), FullFinetune()
METHODS = {"lora": LORA, "sft": FULL}


def storage_bytes(tensor: torch.Tensor) -> int:
    if hasattr(tensor, "__tensor_flatten__"):
        return sum(storage_bytes(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
    return tensor.nbytes


def with_layers(configs: ModelConfigs, count: int) -> ModelConfigs:
    return replace(configs, transformer=configs.transformer | {"num_layers": count})


def kept_by_forward(transformer: torch.nn.Module, inputs: dict) -> int:
    """Return the bytes that autograd keeps for the backward pass, without the parameters."""
    parameters = {parameter.untyped_storage()._cdata for parameter in transformer.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = transformer(**inputs)  # noqa: F841 holds on to the graph
    return sum(storage.nbytes() for key, storage in kept.items() if key not in parameters)


@cache
def released_facts(kind: str, name: str) -> ModelFacts:
    return model_facts(full_size_configs(kind), METHODS[name])


RELEASED = {  # parameters of the transformer, and of adapters of rank 64
    "2b": (1_693_783_872, 29_491_200),
    "5b": (5_570_283_072, 66_060_288),
    "5b-i2v": (5_570_479_680, 66_060_288),
    "1.5-5b": (5_570_676_352, 66_060_288),
    "1.5-5b-i2v": (5_571_594_880, 66_060_288),
}


@pytest.mark.parametrize("kind", RELEASED)
def test_the_parameters_of_the_released_models_are_counted(kind):
    facts = released_facts(kind, "lora")
    trainable = sum(one.numel for one in facts.trainable)
    assert (sum(one.numel for one in facts.parameters) - trainable, trainable) == RELEASED[kind]


def test_weights_and_gradients_are_those_of_a_real_model(tiny_models):
    source = ModelSource(str(tiny_models("5b")))
    for name, method in METHODS.items():
        transformer = source.load_transformer(torch.bfloat16 if name == "lora" else torch.float32)
        method.attach(transformer)
        configs = source.configs()
        settings, workload = MemorySettings(name), Workload(SMALL, 1)
        result = account(model_facts(configs, method), settings, workload)
        trained = sum(parameter.nbytes for parameter in transformer.parameters() if parameter.requires_grad)
        assert result.trained_weights == result.gradients == trained
        assert result.frozen_weights == sum(parameter.nbytes for parameter in transformer.parameters()) - trained


OPTIMIZERS = {name: {} for name in ("adam", "prodigy", "came", "schedulefree", "muon")}
OPTIMIZERS |= {"adamw": {"use_8bit": True}}
OPTIMIZERS |= {f"adamw, torchao {bits}": {bits: True, "use_torchao": True} for bits in LOW_BITS}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_states_are_those_of_the_real_optimizer(name, tiny_models):
    configs = with_layers(ModelSource(str(tiny_models("2b"))).configs(), 1)
    transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
    optimizer_name, settings = name.split(",")[0], OPTIMIZERS[name]
    for parameter in transformer.parameters():
        torch.nn.init.ones_(parameter)  # prodigy does not keep zeros
        parameter.grad = torch.zeros_like(parameter)
    optimizer = make_optimizer(transformer.parameters(), OptimizerFlags(optimizer_name, **settings), 1e-3, fused=False)
    # torchao compiles its step, which takes minutes and changes nothing here.
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    states = [state for part in getattr(optimizer, "parts", [optimizer]) for state in part.state.values()]
    tables = ("qmap1", "qmap2")  # of bitsandbytes: shared by all parameters
    real = sum(
        storage_bytes(value)
        for state in states
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0 and key not in tables
    )
    facts = model_facts(configs, FULL)
    said = MemorySettings("sft", optimizer=optimizer_name, **settings)
    assert sum(state_bytes(parameter, said) for parameter in facts.parameters) == real


@pytest.mark.parametrize("quantization", ["int8", "fp8", "nf4"])
def test_quantized_weights_are_as_large_as_those_of_the_packages(quantization, tiny_models):
    source = ModelSource(str(tiny_models("5b")))
    transformer = source.load_transformer(torch.bfloat16, quantize=quantization)
    configs = source.configs()
    settings = MemorySettings("lora", quantize_base=quantization)
    result = account(model_facts(configs, LORA), settings, Workload(SMALL, 1))
    states = [weight.quant_state for weight in transformer.parameters() if hasattr(weight, "quant_state")]
    parts = [
        part
        for state in states
        for part in (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
    ]
    assert bool(parts) == (quantization == "nf4")
    weights = sum(storage_bytes(parameter) for parameter in transformer.parameters())
    assert result.frozen_weights == weights + sum(part.nbytes for part in parts)


def of_second_block(configs: ModelConfigs, kept: Callable[[ModelConfigs], int]) -> int:
    return kept(with_layers(configs, 2)) - kept(with_layers(configs, 1))


@pytest.mark.parametrize("kind", ["2b", "5b"])
@pytest.mark.parametrize("name", METHODS)
def test_kept_activations_are_what_autograd_keeps_in_float32(name, kind, tiny_models):
    def kept(configs: ModelConfigs) -> int:
        transformer = CogVideoXTransformer3DModel.from_config(configs.transformer).train()
        METHODS[name].attach(transformer)
        set_attention(transformer)
        inputs = fake_inputs(configs, SMALL, 2, torch.float32)
        inputs = {key: value.zero_() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        return kept_by_forward(transformer, inputs)

    configs = ModelSource(str(tiny_models(kind))).configs()
    tensors = block_tensors(model_facts(configs, METHODS[name]), MemorySettings(name), Workload(SMALL, 2, "no"))
    assert sum(tensors.values()) == pytest.approx(of_second_block(configs, kept), rel=0.03)


@pytest.mark.parametrize("name", METHODS)
def test_kept_activations_are_what_autograd_keeps_under_autocast_on_a_gpu(name):
    def kept(configs: ModelConfigs) -> int:
        transformer = on_meta(configs, METHODS[name])
        with FakeTensorMode(allow_non_fake_inputs=True), gpu_like():
            fake_model(transformer, torch.bfloat16)
            return kept_by_forward(transformer, fake_inputs(configs, NATIVE, 1, torch.bfloat16))

    tensors = block_tensors(released_facts("5b", name), MemorySettings(name), Workload(NATIVE, 1))
    assert sum(tensors.values()) == pytest.approx(of_second_block(full_size_configs("5b"), kept), rel=0.02)


@pytest.mark.parametrize(
    ("name", "kind", "scope"),
    [
        ("lora", "5b", "block"),
        ("lora", "5b", "all-but-attention"),
        ("lora", "5b", "feed-forward"),
        ("sft", "5b", "block"),
        ("lora", "2b", "none"),
    ],
)
def test_the_peak_of_a_step_is_what_allocations_add_up_to(name, kind, scope):
    configs = with_layers(full_size_configs(kind), 3)
    transformer = on_meta(configs, METHODS[name])
    if scope != "none":
        checkpoint_activations(transformer, scope)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_model(transformer, torch.float32)
        inputs = fake_inputs(configs, NATIVE, 1, torch.float32)
        with StepCounter(list(transformer.parameters())) as counter:
            transformer(**inputs)[0].square().mean().backward()
    is_checkpointed = scope != "none"
    scopes = {"checkpoint_scope": scope} if is_checkpointed else {}
    settings = MemorySettings(name, gradient_checkpointing=is_checkpointed, **scopes)
    result = account(model_facts(configs, METHODS[name]), settings, Workload(NATIVE, 1, "no"))
    assert result.training - result.resident - result.batch == pytest.approx(counter.cost.peak, rel=0.05)


def with_control(configs: ModelConfigs) -> ModelConfigs:
    return ControlToVideo().model_configs(configs)


ALL = ("all-linear",)
OTHERS = {
    "LoKr, all layers": Lora(64, 64, ALL, adapter="lokr"),
    "LoHa": Lora(64, 64, adapter="loha"),
    "DoRA": Lora(64, 64, use_dora=True),
    "dropout, all layers": Lora(64, 64, ALL, dropout=0.1),
    "control": Lora(64, 64, new_inputs=64),
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_peak_of_a_step_with_other_adapters_is_what_allocations_add_up_to(name):
    configs, method = with_layers(full_size_configs("5b"), 1), OTHERS[name]
    configs = with_control(configs) if method.new_inputs else configs
    transformer = on_meta(configs, method)
    checkpoint_activations(transformer)
    with FakeTensorMode(allow_non_fake_inputs=True), gpu_like():
        fake_model(transformer, torch.bfloat16)
        inputs = fake_inputs(configs, NATIVE, 1, torch.bfloat16)
        with StepCounter(list(transformer.parameters())) as counter:
            transformer(**inputs)[0].float().square().mean().backward()
    settings = MemorySettings("lora", gradient_checkpointing=True)
    result = account(model_facts(configs, method), settings, Workload(NATIVE, 1))
    assert result.training - result.resident - result.batch == pytest.approx(counter.cost.peak, rel=0.05)


def objective_of(task: Task, configs: ModelConfigs, vae: AutoencoderKLCogVideoX | None = None) -> Objective:
    """Return an objective whose transformer takes no memory but that of its result."""

    def predict(hidden_states: torch.Tensor, **_: Any) -> tuple[torch.Tensor]:
        return (hidden_states[:, :, :16].clone(),)

    config = FrozenDict(configs.transformer | {"use_rotary_positional_embeddings": False})
    scheduler = CogVideoXDDIMScheduler(prediction_type="v_prediction")
    return Objective(task, predict, SimpleNamespace(config=config), scheduler, configs, vae, torch.bfloat16)


BATCHES = {  # task, kind, latent frames that are given, given frames, masks
    "plain": (TextToVideo(), "5b", 0, 1, False),
    "masks": (TextToVideo(), "5b", 0, 1, True),
    "control": (ControlToVideo(), "5b", 5, 1, False),
    "image": (ImageToVideo(0.05, True), "5b-i2v", 1, 1, False),
    "ends": (ImageToVideo(0.05, True, "first,last"), "5b-i2v", 2, 2, False),
    "beginning": (ImageToVideo(0.05, True, "first:3"), "5b-i2v", 3, 9, False),
}


@pytest.mark.parametrize("name", BATCHES)
def test_the_bytes_of_a_batch_are_those_of_its_tensors_and_of_what_is_computed_from_them(name, tiny_models):
    task, kind, given, given_frames, has_masks = BATCHES[name]
    configs = task.model_configs(ModelSource(str(tiny_models(kind))).configs())
    size, count = SMALL.latent_shape, 2
    moments = {"image_moments" if task.condition == "image" else "control_moments": given} if given else {}
    batch = Batch(
        ["clip"] * count,
        SMALL,
        masks=torch.ones(count, *size).half() if has_masks else None,
        prompt_embeds=torch.zeros(count, 226, 64, dtype=torch.bfloat16),
        **{
            field: torch.zeros(count, 32, frames, *size[1:], dtype=torch.bfloat16)
            for field, frames in {"video_moments": size[0], **moments}.items()
        },
    )
    generators = [torch.Generator() for _ in range(count)]
    with StepCounter(list(batch.tensors.values())) as counter:
        objective_of(task, configs).losses(batch, torch.tensor([500] * count), generators)
    facts = model_facts(configs, LORA)
    workload = Workload(SMALL, count, given_frames=given_frames, has_masks=has_masks)
    positions = 2 * 4 * (facts.dim // facts.heads) * (facts.count_tokens(SMALL) - 226)
    expected = counter.cost.peak + sum(tensor.nbytes for tensor in batch.tensors.values())
    assert batch_bytes(facts, workload) - positions == pytest.approx(expected, rel=0.06)


def test_the_peak_of_encoding_raw_clips_and_controls_is_what_allocations_add_up_to():
    size, configs = Bucket(9, 40, 96), with_control(with_layers(full_size_configs("5b"), 1))
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(configs.vae).requires_grad_(False).eval()
    vae.enable_slicing()
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_model(vae, torch.bfloat16)
        pixels = [torch.empty(2, size.num_frames, 3, size.height, size.width, dtype=torch.uint8) for _ in range(2)]
        embeds = torch.empty(2, 226, 4096, dtype=torch.bfloat16)
        batch = Batch(["clip"] * 2, size, videos=pixels[0], controls=pixels[1], prompt_embeds=embeds)
        with StepCounter([*vae.parameters(), *batch.tensors.values()]) as counter:
            generators = [torch.Generator() for _ in range(2)]
            objective_of(ControlToVideo(), configs, vae).losses(batch, torch.tensor([500, 500]), generators)
    workload = Workload(size, 2, is_raw=True, slicing=True)
    result = account(model_facts(configs, LORA), MemorySettings("lora"), workload)
    encoding = result.batch + result.encoding - sum(tensor.nbytes for tensor in batch.tensors.values())
    assert encoding == pytest.approx(counter.cost.peak, rel=0.05)
    assert result.vae_weights == sum(parameter.nbytes for parameter in vae.parameters())
    assert result.training >= result.resident + result.vae_weights + result.batch + result.encoding


def test_the_peak_of_a_denoising_step_is_what_allocations_add_up_to():
    configs = with_layers(full_size_configs("5b"), 1)
    transformer = on_meta(configs, LORA).requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), gpu_like():
        fake_model(transformer, torch.bfloat16)
        inputs = fake_inputs(configs, NATIVE, 2, torch.bfloat16)
        with StepCounter(list(transformer.parameters())) as counter:
            transformer(**inputs)
    expected = sampling_bytes(model_facts(configs, LORA), Workload(NATIVE, 1, sampled=NATIVE))
    assert expected == pytest.approx(counter.cost.peak, rel=0.1)


def test_the_peak_of_decoding_is_what_allocations_add_up_to():
    size = Bucket(17, 16, 64)  # two tiles
    configs = with_layers(full_size_configs("5b"), 1)
    configs = replace(configs, vae=configs.vae | {"sample_height": 64, "sample_width": 96})
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(configs.vae).requires_grad_(False).eval()
    vae.enable_tiling()
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        fake_model(vae, torch.bfloat16)
        latents = torch.empty(1, 16, *size.latent_shape, dtype=torch.bfloat16)
        with StepCounter(list(vae.parameters())) as counter:
            vae.decode(latents)
    expected = decoding_bytes(model_facts(configs, LORA), Workload(size, 1, sampled=size))
    assert expected == pytest.approx(counter.cost.peak, rel=0.1)


@pytest.mark.parametrize(
    ("batch", "size", "tiling"),
    [(1, NATIVE, False), (1, Bucket(9, 240, 648), True), (4, NATIVE, False), (1, Bucket(85, 256, 256), False)],
)
def test_the_peak_of_encoding_is_what_allocations_add_up_to(batch, size, tiling):
    config = full_size_configs("5b").vae
    with torch.device("meta"):
        vae = AutoencoderKLCogVideoX.from_config(config).requires_grad_(False).eval()
    vae.use_tiling = tiling
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake_model(vae, torch.bfloat16)
        videos = torch.empty(batch, size.num_frames, 3, size.height, size.width, dtype=torch.uint8)
        with StepCounter(list(vae.parameters())) as counter:
            encode_videos(vae, videos)
    assert encoding_bytes(config, size, batch, 2, tiling=tiling) == pytest.approx(counter.cost.peak, rel=0.03)


def account_5b(name: str, **settings) -> MemoryAccount:
    workload = Workload(NATIVE, 1, sampled=NATIVE)
    memory = MemorySettings(name, gradient_checkpointing=True, **settings)
    return account(released_facts("5b", name), memory, workload)


def test_offloaded_checkpoints_leave_two_inputs_on_the_device():
    plain, offloaded = account_5b("lora"), account_5b("lora", offload_checkpoints=True)
    assert offloaded.kept_inputs == plain.kept_inputs * 2 // 42
    assert offloaded.host == plain.kept_inputs - offloaded.kept_inputs


def test_streamed_blocks_leave_two_blocks_on_the_device():
    plain, streamed = account_5b("lora"), account_5b("lora", stream_blocks=True)
    assert plain.frozen_weights - streamed.frozen_weights == 40 * (streamed.host // 42)


def test_a_step_in_the_backward_pass_holds_one_gradient():
    # A matrix of a feed-forward is the largest weight.
    assert account_5b("sft", step_in_backward=True).gradients == 4 * 3072 * 12288


def test_replicated_gradients_are_in_buckets_all_the_time():
    alone, replicated = (
        account(released_facts("5b", "sft"), MemorySettings("sft"), Workload(NATIVE, 1, is_replicated=is_replicated))
        for is_replicated in (False, True)
    )
    # The activations of 42 blocks are there at the same time.
    assert replicated.resident - alone.resident == alone.gradients == replicated.gradient_buckets
    assert replicated.training - alone.training == alone.gradients


def test_an_offloaded_optimizer_has_states_gradients_and_weights_on_the_host():
    plain = account_5b("sft")
    offloaded = account_5b("sft", use_cpu_offload_optimizer=True, offload_gradients=True)
    # Copies are pinned in powers of two: most weights are matrices of 9 x 2^n numbers, so that 16 x 2^n are taken.
    assert offloaded.host - plain.optimizer_states == pytest.approx(2 * 16 / 9 * plain.trained_weights, rel=0.01)
    assert offloaded.gradients == plain.gradients - plain.earlier_gradients


def test_a_lora_of_the_5b_model_takes_less_than_the_published_memory():
    # The original factory, rank 64: 20.8 GB reserved in training.
    assert 17 < account_5b("lora").training / GB < 19
