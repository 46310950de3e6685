"""The change of a layer as two factors: exact for every adapter, or the nearest ones of a lower rank."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch


_WEIGHTS = {
    "lora": r"lora_[AB]\.weight|lora_magnitude_vector",
    "lokr": "lokr_w[12](_[ab])?",
    "loha": "hada_w[12]_[ab]",
}


@dataclass(frozen=True)
class Factors:
    """The change of a layer's weight: strength * up @ down."""

    up: torch.Tensor  # [out, rank]; of a convolution [out, rank, 1, 1]
    down: torch.Tensor  # [rank, in]; of a convolution [rank, in, height, width]
    strength: float = 1.0  # alpha / rank
    magnitude: torch.Tensor | None = None  # of DoRA: the norms of the changed weight's rows, [out]

    @property
    def rank(self) -> int:
        """The rank of the factors."""
        return self.down.shape[0]

    def added_to(self, weight: torch.Tensor) -> torch.Tensor:
        """Return a layer's weight with the change, computed in float32, in the dtype of the weight."""
        change = self.strength * (self.up.flatten(1).float() @ self.down.flatten(1).float())
        changed = weight.flatten(1).float() + change
        if self.magnitude is not None:
            changed *= (self.magnitude.float() / changed.norm(dim=1))[:, None]
        return changed.to(weight.dtype).reshape(weight.shape)


def exact_factors(kind: str, weights: Mapping[str, torch.Tensor], strength: float) -> Factors:
    """Return the factors of a layer's change, without loss.

    A LoKr is kron(A, B C) = kron(A, B) kron(1, C), whose rank is that of A times that of B C. A LoHa is
    (A B) * (C D), whose rank is up to the square of its own: row i of the factors is row i of A and C multiplied.

    Args:
        kind: "lora", "lokr" or "loha".
        weights: of the layer's adapter, by the ends of peft's names, such as "lora_A.weight" or "lokr_w1".

    Raises ValueError if weights are missing, unknown, or do not fit together.

    Source: https://arxiv.org/abs/2309.14859, LoHa as FedPara https://arxiv.org/abs/2108.06098.
    """
    if unknown := [name for name in weights if not re.fullmatch(_WEIGHTS[kind], name)]:
        raise ValueError(f"it holds {unknown[0]}")
    try:
        factors = _factors(kind, weights, strength)
    except KeyError as error:
        raise ValueError(f"it lacks {error.args[0]}") from error
    if factors.up.shape[1] != factors.rank:
        raise ValueError(f"its weights of ranks {factors.up.shape[1]} and {factors.rank} do not fit together")
    return factors


def _factors(kind: str, weights: Mapping[str, torch.Tensor], strength: float) -> Factors:
    if kind == "lora":
        up, down = weights["lora_B.weight"], weights["lora_A.weight"]
        return Factors(up, down, strength, weights.get("lora_magnitude_vector"))
    # A product of two numbers needs more digits than either.
    weights = {name: weight.float() for name, weight in weights.items()}
    if kind == "loha":
        a, b, c, d = (weights[f"hada_{name}"] for name in ("w1_a", "w1_b", "w2_a", "w2_b"))
        up, down = (a[:, :, None] * c[:, None, :]).flatten(1), (b[:, None, :] * d[None, :, :]).flatten(0, 1)
        return Factors(up, down, strength)
    left, right = (_pair(weights, name) for name in ("lokr_w1", "lokr_w2"))
    return Factors(torch.kron(left[0], right[0]), torch.kron(left[1], right[1]), strength)


def _pair(weights: Mapping[str, torch.Tensor], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two matrices whose product is the named one, which is stored as it is or as two."""
    if name not in weights:
        return weights[f"{name}_a"], weights[f"{name}_b"]
    full = weights[name]
    return full, torch.eye(full.shape[1], dtype=full.dtype, device=full.device)


def concatenate(parts: list[Factors]) -> Factors:
    """Return the factors of the sum of changes, exactly: their ranks add up. One change is returned as it is."""
    if len(parts) == 1:
        return parts[0]
    dtype = torch.promote_types(parts[0].up.dtype, torch.float32)
    up = torch.cat([part.strength * part.up.to(dtype) for part in parts], dim=1)
    return Factors(up, torch.cat([part.down.to(dtype) for part in parts]))


def reduce_rank(factors: Factors, rank: int | None, energy: float | None) -> tuple[Factors, float, float]:
    """Find the nearest factors of a lower rank (Eckart-Young), by the SVD of the small matrix between their bases.

    Args:
        rank: the highest; None for no limit.
        energy: share of the sum of squared singular values to keep, in (0, 1]; None for all that the rank allows.

    Returns:
        The factors, and the sums of the squared singular values that they keep and of all.
    """
    up, down = factors.up.flatten(1).double(), factors.down.flatten(1).double()
    rows, of_rows = torch.linalg.qr(up)
    columns, of_columns = torch.linalg.qr(down.T)
    left, values, right = torch.linalg.svd(factors.strength * of_rows @ of_columns.T, full_matrices=False)
    kept, energy_kept = _first_values(left, values, right, rank, energy)
    reduced = _in_shape(Factors(rows @ kept.up, kept.down @ columns.T), factors.down.shape)
    return reduced, energy_kept, values.square().sum().item()


def decompose(change: torch.Tensor, rank: int | None, energy: float | None) -> tuple[Factors, float, float]:
    """Find the nearest factors of a change, [out, in] or [out, in, height, width], in float32.

    Arguments and results are those of `reduce_rank`.
    """
    shape, change = change.shape, change.flatten(1).float()
    if energy is None and rank is not None and 4 * rank < min(change.shape):
        # Several times faster than all singular values; the iterations separate the first ones from the rest.
        left, values, right = torch.svd_lowrank(change, q=rank + 8, niter=6)
        right = right.T
    else:
        left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept, energy_kept = _first_values(left, values, right, rank, energy)
    return _in_shape(kept, shape), energy_kept, change.square().sum().item()


def _in_shape(factors: Factors, shape: torch.Size) -> Factors:
    """Return factors, given as matrices, of a layer's change of this shape."""
    if len(shape) == 2:
        return factors
    return Factors(factors.up[:, :, None, None], factors.down.unflatten(1, shape[1:]))


def _first_values(
    left: torch.Tensor, values: torch.Tensor, right: torch.Tensor, rank: int | None, energy: float | None
) -> tuple[Factors, float]:
    """Return factors of the first singular values, each with their roots, and the sum of their squares."""
    # What rounding adds to a lower rank is dropped.
    count = max(1, int((values > values[0] * len(values) * torch.finfo(values.dtype).eps).sum()))
    if energy is not None:
        shares = values.square().cumsum(0) / values.square().sum()
        count = min(count, int((shares < energy).sum()) + 1)
    if rank is not None:
        count = min(count, rank)
    roots = values[:count].sqrt()
    return Factors(left[:, :count] * roots, roots[:, None] * right[:count]), values[:count].square().sum().item()
