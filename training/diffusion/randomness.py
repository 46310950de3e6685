"""Random numbers that depend on seed, step and sample only, whatever ran before."""

import hashlib
from collections.abc import Sequence

import torch

from data.sampler import Draw


def derive_seed(seed: int, *position: object) -> int:
    """A seed for torch, of 63 bits, that depends on nothing but `seed` and what else is given."""
    return int.from_bytes(hashlib.sha256(repr((seed, *position)).encode()).digest()[:8], "big") >> 1


def step_generator(device: torch.device, seed: int, *position: object) -> torch.Generator:
    """A random generator that depends on nothing but `seed` and what else is given (a step, a sample).

    Noise drawn from it is the same after a resume, whatever validation or data loading did to the global generators.
    """
    return torch.Generator(device).manual_seed(derive_seed(seed, *position))


def seed_global(device: torch.device, seed: int) -> None:
    """Seed torch's global generators of the CPU and of `device`.

    `torch.manual_seed` goes through every kind of accelerator there is, which takes as long as 3% of a small step.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def sample_generators(device: torch.device, seed: int, draws: Sequence[Draw]) -> list[torch.Generator]:
    """A random generator for each sample of a batch.

    What a sample is trained with then follows from the seed and its draw alone: it is the same in a batch of four, in
    four batches of one whose gradients accumulate, on any rank, and after a resume.
    """
    return [step_generator(device, seed, *draw) for draw in draws]
