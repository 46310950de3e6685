"""Every optimizer learns and goes on from a checkpoint; every combination of flags works or is refused."""

import copy
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from diffusers import CogVideoXTransformer3DModel
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from checks.memory import check_optimizer
from cli.schema import replace_flags
from common.errors import UserError
from diffusion.latents import velocity_losses
from diffusion.positions import rotary_embeddings
from flags.optimizer import LOW_BITS, OPTIMIZERS, OptimizerFlags
from flags.settings import TrainingSettings
from methods.lora import Lora
from models.configs import DTYPES
from optimizers.build import (
    apply_learning_rate,
    can_step,
    check_launch,
    clip_gradients,
    keep_rates_on_host,
    make_optimizer,
    step_if_finite,
)


STATES = [{}, {"use_8bit": True}, *({bits: True, "use_torchao": True} for bits in LOW_BITS)]
ALL = [
    *({"optimizer": name} | states for states in STATES for name in ("adam", "adamw")),
    {"optimizer": "prodigy", "learning_rate": 1.0, "prodigy_safeguard_warmup": True},
    {"optimizer": "came", "learning_rate": 2e-4},
    {"optimizer": "schedulefree"},
    {"optimizer": "muon"},
]


@pytest.fixture(autouse=True)
def eager() -> Iterator[None]:
    """torchao compiles its step, which changes nothing in the result and takes long on a CPU."""
    with torch.compiler.set_stance("force_eager"):
        yield


def parameters() -> list[torch.nn.Parameter]:
    """A matrix large enough to have low-bit states, a vector, and one that is frozen."""
    torch.manual_seed(0)
    shapes = {(64, 128): True, (128,): True, (8,): False}
    return [torch.nn.Parameter(torch.randn(shape), requires_grad=trains) for shape, trains in shapes.items()]


def make(
    weights: Sequence[torch.nn.Parameter], learning_rate: float = 1e-2, stochastic_rounding: bool = False, **flags
) -> Optimizer:
    return make_optimizer(weights, OptimizerFlags(**flags), learning_rate, stochastic_rounding=stochastic_rounding)


def train(
    weights: Sequence[torch.nn.Parameter],
    optimizer: Optimizer,
    steps: range,
    rate: float,
    loss_of: Callable[[], torch.Tensor] | None = None,
) -> list[float]:
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=40)
    scheduler.last_epoch = steps.start
    apply_learning_rate(optimizer, scheduler, rate)
    losses = []
    for _ in steps:
        loss = loss_of() if loss_of else (weights[0] @ weights[1].tanh() - 3).square().mean()
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.fixture(scope="module")
def lora(tiny_models) -> tuple[CogVideoXTransformer3DModel, Callable[[], torch.Tensor]]:
    transformer = CogVideoXTransformer3DModel.from_pretrained(tiny_models("5b"), subfolder="transformer")
    torch.manual_seed(0)
    Lora(rank=64, alpha=64, target_modules=["to_out.0"]).attach(transformer)
    latents, target = torch.randn(2, 1, 5, 16, 8, 12)
    prompt = torch.randn(1, 226, transformer.config.text_embed_dim)
    rotary = rotary_embeddings(transformer, 5, 64, 96, torch.device("cpu"))

    def loss_of() -> torch.Tensor:
        velocity = transformer(latents, prompt, torch.tensor([500]), image_rotary_emb=rotary).sample
        return velocity_losses(velocity, target).mean()

    return transformer, loss_of


@pytest.mark.parametrize("flags", ALL, ids=str)
def test_every_optimizer_lowers_the_loss_of_a_lora_and_leaves_frozen_weights(lora, flags):
    transformer, loss_of = lora
    before = {name: weight.clone() for name, weight in transformer.state_dict().items()}
    rate = flags.get("learning_rate", 2e-3)
    weights = list(transformer.parameters())
    losses = train(weights, make(weights, **(flags | {"learning_rate": rate})), range(1, 4), rate, loss_of)
    changed = {name for name, weight in transformer.state_dict().items() if not torch.equal(weight, before[name])}
    transformer.load_state_dict(before)
    assert losses[-1] < losses[0]
    assert changed == {name for name in before if "lora" in name}


@pytest.mark.parametrize("flags", ALL, ids=str)
def test_every_optimizer_goes_on_from_a_checkpoint_bit_for_bit(flags, tmp_path):
    rate = flags.get("learning_rate", 1e-2)
    weights = parameters()
    optimizer = make(weights, **(flags | {"learning_rate": rate}))
    train(weights, optimizer, range(4), rate)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    resumed = copy.deepcopy(weights)
    train(weights, optimizer, range(4, 8), rate)
    assert not torch.equal(weights[0], resumed[0])
    optimizer = make(resumed, **(flags | {"learning_rate": rate}))
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.bin", weights_only=True))
    train(resumed, optimizer, range(4, 8), rate)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(resumed, weights, strict=True))


@pytest.mark.parametrize("stochastic_rounding", [False, True])
@pytest.mark.parametrize("flags", [flags for flags in ALL if flags.get("use_torchao")], ids=str)
def test_no_step_calls_the_compiler_again(flags, stochastic_rounding, monkeypatch):
    weights = parameters()
    before = copy.deepcopy(weights)
    optimizer = make(weights, stochastic_rounding=stochastic_rounding, **flags)
    monkeypatch.delattr(torch, "compile")
    train(weights, optimizer, range(2), 1e-2)
    changed = [not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True)]
    assert changed == [weight.requires_grad for weight in weights]


def test_adamw_takes_the_published_step():
    """One step of decoupled Adam, https://arxiv.org/abs/1711.05101, by hand."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make([weight], 0.1, optimizer="adamw", beta1=0.9, beta2=0.95, weight_decay=0.01, epsilon=1e-8)
    (weight * torch.tensor([3.0, -0.5])).sum().backward()
    optimizer.step()
    # Bias correction makes the first step the gradient's sign.
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 * (1 - 0.001) - 0.1, -2.0 * (1 - 0.001) + 0.1]))


def test_muon_steps_matrices_and_adamw_the_rest():
    matrix, bias = (torch.nn.Parameter(torch.randn(shape)) for shape in ((16, 32), (32,)))
    alone = [torch.nn.Parameter(weight.detach().clone()) for weight in (matrix, bias)]
    optimizer = make([matrix, bias], 0.1, optimizer="muon", beta1=0.8, weight_decay=0.01)
    muon = torch.optim.Muon([alone[0]], 0.1, momentum=0.8, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW([alone[1]], 0.1, betas=(0.8, 0.95), weight_decay=0.01, fused=True)
    for weights, optimizers in (((matrix, bias), [optimizer]), (alone, [muon, adamw])):
        for _ in range(2):
            (weights[0] @ weights[1]).square().sum().backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    assert torch.equal(matrix, alone[0])
    assert torch.equal(bias, alone[1])


def test_muon_is_refused_where_torch_lacks_it(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(UserError, match=r"--optimizer muon: .* use --optimizer adamw"):
        make(parameters(), optimizer="muon")


def test_small_updates_of_bf16_weights_are_not_lost():
    """Each is a hundredth of what bf16 can tell from 1: rounded to the nearest, none would change anything."""
    weight = torch.nn.Parameter(torch.ones(100, 100, dtype=torch.bfloat16))
    optimizer = make(
        [weight], 2**-8 / 100, stochastic_rounding=True, optimizer="adamw", weight_decay=0, use_torchao=True
    )
    torch.manual_seed(0)
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert weight.detach().float().mean().item() == pytest.approx(1 - 50 * 2**-8 / 100, abs=2e-5)


def test_offloading_without_a_gpu_is_refused_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--use_cpu_offload_optimizer"):
        make(parameters(), optimizer="adamw", use_cpu_offload_optimizer=True)


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedulefree", "schedulefree")])
def test_a_missing_package_is_named(monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"--optimizer {name}: needs the package {package} \(pip install {package}\)"):
        make(parameters(), optimizer=name)


@pytest.mark.parametrize(("max_norm", "scale"), [(1.0, 0.2), (10.0, 1.0), (0.0, 1.0)])
def test_gradients_are_clipped_to_a_norm_and_not_at_all_by_zero(fresh_accelerator, max_norm, scale):
    accelerator = Accelerator(cpu=True)
    weight = torch.nn.Parameter(torch.zeros(2))
    optimizer = accelerator.prepare(torch.optim.AdamW([weight]))
    weight.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(accelerator, optimizer, [weight], max_norm).item() == 5
    torch.testing.assert_close(weight.grad, scale * torch.tensor([3.0, 4.0]))


@pytest.mark.parametrize("flags", ALL, ids=str)
def test_a_step_without_finite_gradients_changes_neither_weights_nor_states(fresh_accelerator, flags):
    accelerator = Accelerator(cpu=True)
    weights = [weight for weight in parameters() if weight.requires_grad]
    optimizer = accelerator.prepare(make(weights, **flags))
    for spoilt in (False, True, False):
        before = str([weights, list(optimizer.state.values())])
        loss = (weights[0] @ weights[1].tanh() - 3).square().mean()
        (loss * torch.nan if spoilt else loss).backward()
        step_if_finite(accelerator, optimizer, clip_gradients(accelerator, optimizer, weights, 1.0))
        optimizer.zero_grad()
        assert (str([weights, list(optimizer.state.values())]) == before) is spoilt
        assert all(weight.isfinite().all() for weight in weights)


def test_a_step_in_the_backward_pass_is_not_begun_on_a_loss_that_is_not_finite():
    weights = parameters()
    optimizer = make(weights, optimizer="adamw", step_in_backward=True)
    assert [can_step(optimizer, torch.tensor(loss)) for loss in (1.0, torch.inf, torch.nan)] == [True, False, False]
    assert can_step(make(weights, optimizer="adamw"), torch.tensor(torch.nan))


@pytest.mark.gpu
@pytest.mark.parametrize("step_in_backward", [False, True])
@pytest.mark.parametrize("flags", [flags for flags in ALL if flags.get("use_torchao")], ids=str)
def test_rates_stay_on_the_host_while_a_gpu_steps(fresh_accelerator, flags, step_in_backward):
    weights = [torch.nn.Parameter(weight.detach().cuda()) for weight in parameters()[:2]]
    optimizer = make(weights, step_in_backward=step_in_backward, **flags)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=10)
    optimizer = Accelerator().prepare(optimizer)
    keep_rates_on_host(optimizer)
    losses = []
    with torch.compiler.set_stance("default"):
        for _ in range(5):
            loss = (weights[0] @ weights[1].tanh() - 3).square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert {group["lr"].device.type for group in optimizer.param_groups} == {"cpu"}
    assert scheduler.get_last_lr()[0].device.type == "cpu"
    assert losses[-1] < losses[0]


def combinations(name: str) -> Iterator[TrainingSettings]:
    """Every combination of the flags that choose this optimizer or are at odds with some."""
    groups = {item.name: item.type() for item in fields(TrainingSettings) if is_dataclass(item.type)}
    plain = TrainingSettings("text-to-video", "lora", frozenset(), **groups)
    plain = replace_flags(plain, optimizer=name, learning_rate=1e-3, lr_scheduler="linear", lr_warmup_steps=0)
    choices = {
        "bits": [(), *((flag,) for flag in LOW_BITS), ("use_8bit", "use_fp8"), LOW_BITS],
        "use_torchao": [False, True],
        "use_cpu_offload_optimizer": [False, True],
        "offload_gradients": [False, True],
        "step_in_backward": [False, True],
        "weights_dtype": ["fp32", "bf16"],
        "mixed_precision": [None, "no", "fp16", "bf16"],
        "gradient_accumulation_steps": [1, 2],
        "use_ema": [False, True],
    }
    for values in itertools.product(*choices.values()):
        flags = dict(zip(choices, values, strict=True))
        yield replace_flags(plain, **dict.fromkeys(flags.pop("bits"), True) | flags)


def build(settings: TrainingSettings, weights: list[torch.nn.Parameter]) -> Optimizer:
    return make_optimizer(
        weights, settings.optimizer, 1e-2, stochastic_rounding=settings.memory.weights_dtype == "bf16"
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_combination_of_flags_steps_or_is_refused_in_one_line_that_says_what_to_do(name):
    accepted: dict[tuple, TrainingSettings] = {}
    refusals = set()
    for args in combinations(name):
        try:
            check_optimizer(args)
        except UserError as error:
            refusals.add(str(error))
        else:
            # The others do not change what is built.
            accepted[args.memory.weights_dtype, replace(args.optimizer, offload_gradients=False)] = args
    assert all(re.fullmatch(r"--\w+.*: .*(use|add|omit).*", refusal) for refusal in refusals)
    for args in accepted.values():
        weights = parameters()
        for weight in weights:
            weight.data = weight.data.to(DTYPES[args.memory.weights_dtype])
        before = weights[0].detach().clone()
        if args.optimizer.use_cpu_offload_optimizer and not torch.cuda.is_available():
            with pytest.raises(UserError, match=r"--use_cpu_offload_optimizer: .*there is none here"):
                build(args, weights)
            continue
        optimizer = build(args, weights)
        (weights[0] @ weights[1]).square().mean().backward()
        optimizer.step()
        assert not torch.equal(weights[0], before)


@pytest.mark.parametrize(
    ("kind", "dtype", "name", "chosen", "words"),
    [
        ("MULTI_GPU", torch.float32, "adamw", "step_in_backward", "--step_in_backward: .*launch one process"),
        (
            "DEEPSPEED",
            torch.float32,
            "adamw",
            "use_cpu_offload_optimizer",
            "--use_cpu_offload_optimizer: .*launch one process",
        ),
        ("NO", torch.float16, "adamw", "step_in_backward", "--step_in_backward: .*bf16"),
        ("NO", torch.float16, "adamw", "use_cpu_offload_optimizer", "--use_cpu_offload_optimizer: .*bf16"),
        ("DEEPSPEED", torch.float32, "schedulefree", None, "--optimizer schedulefree: .*use --optimizer adamw"),
        ("FSDP", torch.float32, "muon", None, "--optimizer muon: .*use --optimizer adamw"),
        ("NO", torch.float32, "adamw", "bf16_weights", "--weights_dtype bf16: .*add --mixed_precision bf16"),
    ],
)
def test_what_a_launch_does_not_allow_is_refused(kind, dtype, name, chosen, words):
    flags = {chosen: True} if chosen else {}
    bf16_weights = flags.pop("bf16_weights", False)
    with pytest.raises(UserError, match=words):
        check_launch(OptimizerFlags(name, **flags), DistributedType(kind), dtype, bf16_weights=bf16_weights)


def test_what_a_launch_allows_passes():
    on_host = OptimizerFlags("adamw", use_cpu_offload_optimizer=True, step_in_backward=True)
    check_launch(on_host, DistributedType.NO, torch.bfloat16, bf16_weights=True)
    check_launch(OptimizerFlags("muon"), DistributedType.MULTI_GPU, torch.float16, bf16_weights=False)
    check_launch(OptimizerFlags("adamw"), DistributedType.DEEPSPEED, torch.float32, bf16_weights=False)
