"""The factors of every adapter are exact, and those of a lower rank the nearest ones."""

import pytest
import torch
from peft import LoHaConfig, LoKrConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from methods.lora_factors import Factors, concatenate, decompose, exact_factors, reduce_rank


CONFIGS = {
    "lokr": LoKrConfig(r=3, alpha=6, decompose_factor=4),
    "lokr with full matrices": LoKrConfig(r=20, alpha=20, decompose_factor=4),
    "lokr with both divided": LoKrConfig(r=2, alpha=6, decompose_factor=-1, decompose_both=True),
    "loha": LoHaConfig(r=3, alpha=6),
}
RANKS = {"lokr": 4 * 3, "lokr with full matrices": 48, "lokr with both divided": 2 * 2, "loha": 3 * 3}


def product(factors: Factors) -> torch.Tensor:
    return factors.strength * factors.up.double() @ factors.down.double()


def matrix(values: torch.Tensor, rows: int = 60, columns: int = 40) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(size, len(values), generator=generator))[0] for size in (rows, columns))
    return left * values @ right.T


@pytest.mark.parametrize("name", CONFIGS)
def test_a_lokr_or_loha_is_a_lora_of_the_product_of_its_ranks(name):
    torch.manual_seed(0)
    config = CONFIGS[name]
    config.init_weights, config.target_modules = False, ["0"]
    model = inject_adapter_in_model(config, nn.Sequential(nn.Linear(48, 64)))
    weights = {key.removeprefix("0."): one for key, one in get_peft_model_state_dict(model).items()}
    factors = exact_factors(name[:4], weights, config.alpha / config.r)
    assert factors.rank == RANKS[name]
    expected = model[0].get_delta_weight("default")
    torch.testing.assert_close(product(factors).float(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(60, 40), (300, 200)], ids=["all values", "the first values"])
def test_a_change_of_low_rank_is_decomposed_exactly(size):
    change = matrix(torch.tensor([5.0, 2.0, 1.0, 0.1]), *size)
    factors, kept, total = decompose(change, 16, None)
    assert factors.rank == (4 if size == (60, 40) else factors.rank)
    torch.testing.assert_close(product(factors).float(), change, atol=1e-5, rtol=1e-5)
    assert kept == pytest.approx(total, rel=1e-5) == pytest.approx(30.01, rel=1e-5)


@pytest.mark.parametrize("find", ["decompose", "reduce_rank"])
def test_energy_is_the_share_of_the_squared_singular_values(find):
    change = matrix(torch.tensor([3.0, 2.0, 1.0, 1.0]))  # squares: 9, 4, 1, 1
    change_or_factors = change if find == "decompose" else Factors(change, torch.eye(40), 0.5)

    def found(rank: int | None, energy: float) -> tuple[Factors, float, float]:
        return {"decompose": decompose, "reduce_rank": reduce_rank}[find](change_or_factors, rank, energy)

    for energy, rank in ((0.6, 1), (0.61, 2), (13 / 15, 2), (0.9, 3), (0.99, 4), (1.0, 4)):
        assert found(None, energy - 1e-6)[0].rank == rank
    few, kept, total = found(2, 0.99)
    assert few.rank == 2 and kept / total == pytest.approx(13 / 15, rel=1e-4)


def test_a_lower_rank_is_as_near_as_possible():
    change = matrix(torch.tensor([5.0, 4.0, 0.5, 0.3, 0.1]), 300, 200)
    for factors, _, _ in (decompose(change, 2, None), reduce_rank(Factors(change, torch.eye(200)), 2, None)):
        error = (product(factors) - change).norm()
        assert error == pytest.approx((0.5**2 + 0.3**2 + 0.1**2) ** 0.5, rel=1e-4)


def test_the_factors_of_a_sum_are_exact_and_one_change_is_kept_as_it_is():
    generator = torch.Generator().manual_seed(0)
    one, two = (
        Factors(torch.randn(6, rank, generator=generator), torch.randn(rank, 5, generator=generator), strength)
        for rank, strength in ((2, 0.5), (3, -2.0))
    )
    assert concatenate([one]) is one
    both = concatenate([one, two])
    assert both.rank == 5
    torch.testing.assert_close(product(both), product(one) + product(two), atol=1e-6, rtol=1e-6)
