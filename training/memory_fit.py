"""Change a run's settings so that it fits into memory: `--memory_budget_gb` before it starts, `--auto_fit` after."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from buckets import Bucket
from memory_accounting import MemoryAccount, account
from memory_facts import Workload, model_facts
from memory_plan import (
    Choice,
    RunFacts,
    adapter_key,
    choose,
    describe,
    ladder,
    model_key,
    next_rung,
    read_measured,
    usable_filter,
)
from memory_settings import MemorySettings, apply_settings, differing_flags, read_settings
from methods import Lora
from recipe import Recipe


logger = logging.getLogger(__name__)


def fit_to_budget(recipe: Recipe, given: set[str]) -> Recipe:
    """The recipe with the fastest settings that fit into `--memory_budget_gb`; as it is without that flag.

    Args:
        given: names of the flags that the user typed; what they say stays.

    Raises:
        UserError: nothing fits.
    """
    budget = recipe.args.memory_budget_gb
    if not budget:
        return recipe
    settings, is_usable, account_for = _settings(recipe), usable_filter(recipe.args, given), _accounting(recipe)
    choice: Choice = choose(
        budget,
        ladder(settings, given, is_usable),
        given,
        run_facts(recipe),
        lambda rung: account_for(rung).peak,
        read_measured(),
        is_usable,
    )
    logger.info("%s", describe(choice, settings, budget))
    return with_settings(recipe, choice.settings)


def step_down(recipe: Recipe, given: set[str]) -> Recipe | None:
    """The recipe with the next stronger savings, for `--auto_fit` when its first steps ran out of memory; None: there
    are none."""
    settings = _settings(recipe)
    rungs, account_for = ladder(settings, given, usable_filter(recipe.args, given)), _accounting(recipe)
    # Training or validation, who knows which ran out: less for either is worth a try.
    rung = next_rung(rungs, settings, lambda rung: account_for(rung).training + account_for(rung).validation)
    if rung is None:
        return None
    logger.warning("out of GPU memory; --auto_fit starts again with %s", " ".join(differing_flags(rung, settings)))
    return with_settings(recipe, rung)


def with_settings(recipe: Recipe, settings: MemorySettings) -> Recipe:
    """The recipe with other settings, in its flags, its method and what a checkpoint of it notes."""
    if isinstance(recipe.method, Lora):
        method = replace(recipe.method, quantize_base=settings.quantize_base)
    else:
        method = replace(recipe.method, weights_dtype=settings.weights_dtype)
    state = replace(recipe.state, settings=recipe.state.settings | method.settings)
    return replace(recipe, args=apply_settings(recipe.args, settings), method=method, state=state)


def run_facts(recipe: Recipe) -> RunFacts:
    """What memory depends on beside the settings."""
    args, method = recipe.args, recipe.method
    is_lora = isinstance(method, Lora)
    return RunFacts(
        model=model_key(recipe.configs.transformer),
        method="lora" if is_lora else "sft",
        size=max(recipe.data.buckets, key=_volume),
        batch_size=args.train_batch_size,
        adapters=adapter_key(method.rank, method.target_modules, use_dora=method.use_dora) if is_lora else "",
        sampled=Bucket(args.max_num_frames, args.height, args.width) if args.validation_prompts else None,
        mixed_precision=recipe.accelerator.mixed_precision,
    )


def _volume(size: Bucket) -> int:
    return size.num_frames * size.height * size.width


def _settings(recipe: Recipe) -> MemorySettings:
    return read_settings(recipe.args, "lora" if isinstance(recipe.method, Lora) else "sft")


def _accounting(recipe: Recipe) -> Callable[[MemorySettings], MemoryAccount]:
    """What the recipe takes under some settings."""
    facts, model = run_facts(recipe), model_facts(recipe.configs, recipe.method)
    guided = recipe.args.guidance_scale > 1
    workload = Workload(facts.size, facts.batch_size, facts.mixed_precision, facts.sampled, guided)

    @cache
    def account_for(settings: MemorySettings) -> MemoryAccount:
        return account(model, recipe.configs, settings, workload)

    return account_for
