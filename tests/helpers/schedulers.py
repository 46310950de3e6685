"""The noise schedule: the library's, and an independent one in float64."""

import math

from diffusers import CogVideoXDPMScheduler


def make_scheduler(snr_shift_scale: float) -> CogVideoXDPMScheduler:
    config = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    config |= {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return CogVideoXDPMScheduler(**config, snr_shift_scale=snr_shift_scale)


def alphas_cumprod(snr_shift_scale: float) -> list[float]:
    """The noise schedule, from its published definition, in float64."""
    roots = [math.sqrt(0.00085) + (math.sqrt(0.012) - math.sqrt(0.00085)) * i / 999 for i in range(1000)]
    products, product = [], 1.0
    for root in roots:
        product *= 1 - root**2
        products.append(product / (snr_shift_scale + (1 - snr_shift_scale) * product))
    # Zero terminal SNR (https://arxiv.org/abs/2305.08891): shift and scale sqrt(ac) so that it ends at 0.
    first, last = math.sqrt(products[0]), math.sqrt(products[-1])
    return [((math.sqrt(ac) - last) * first / (first - last)) ** 2 for ac in products]
