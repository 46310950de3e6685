import pytest
import torch
from diffusers.optimization import get_scheduler

from errors import UserError
from optimizers import make_optimizer


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(64, 128)), torch.nn.Parameter(torch.randn(8), requires_grad=False)]


@pytest.mark.parametrize(
    "flags",
    [
        {"name": "adam"},
        {"name": "adamw"},
        {"name": "adam", "use_8bit": True},
        {"name": "adamw", "use_8bit": True},
        {"name": "adam", "use_8bit": True, "use_torchao": True},
        {"name": "adamw", "use_8bit": True, "use_torchao": True},
        {"name": "adam", "use_4bit": True, "use_torchao": True},
        {"name": "adamw", "use_4bit": True, "use_torchao": True},
        {"name": "prodigy", "learning_rate": 1.0},
        {"name": "came"},
    ],
    ids=str,
)
def test_every_optimizer_lowers_a_loss_with_a_schedule_and_leaves_frozen_parameters(flags):
    weight, frozen = parameters()
    before = frozen.clone()
    optimizer = make_optimizer([weight, frozen], **({"learning_rate": 1e-2} | flags))
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=40)
    losses = []
    # torchao compiles its step, which changes nothing in the result and takes long on a CPU.
    with torch.compiler.set_stance("force_eager"):
        for _ in range(40):
            loss = weight.square().mean()
            loss.backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert torch.equal(frozen, before)


def test_adamw_takes_the_published_step():
    """One step of decoupled Adam, https://arxiv.org/abs/1711.05101, by hand."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    optimizer = make_optimizer(
        [weight], "adamw", learning_rate=0.1, beta1=0.9, beta2=0.95, weight_decay=0.01, epsilon=1e-8
    )
    (weight * torch.tensor([3.0, -0.5])).sum().backward()
    optimizer.step()
    # Bias correction makes the first step the gradient's sign.
    torch.testing.assert_close(weight.detach(), torch.tensor([1.0 * (1 - 0.001) - 0.1, -2.0 * (1 - 0.001) + 0.1]))


def test_offloading_without_a_gpu_is_refused_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UserError, match="--use_cpu_offload_optimizer"):
        make_optimizer(parameters(), "adamw", learning_rate=1e-3, use_cpu_offload=True)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "prodigyopt", None)
    with pytest.raises(
        UserError, match=r"--optimizer prodigy: needs the package prodigyopt \(pip install prodigyopt\)"
    ):
        make_optimizer(parameters(), "prodigy", learning_rate=1.0)
