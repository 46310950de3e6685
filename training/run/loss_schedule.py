"""When a run measures the loss of its held-out clips, from the work of its steps."""

import math
from dataclasses import replace

from checkpoints.schedule import StepSchedule
from data.buckets import count_tokens
from data.sampler import BucketBatchSampler
from planning.held_out import SHARE
from run.spec import RunSpec
from tracking.flops import count_flops, count_forward_flops
from validation.schedule import QUANTILES, LossSchedule, schedule_losses


def plan_losses(
    spec: RunSpec, sampler: BucketBatchSampler, schedule: StepSchedule, total_steps: int
) -> LossSchedule | None:
    """Return the measurements of a run; None if no clip is held out. A resumed run measures as it did before."""
    held_out, flags, num_ranks = spec.data.held_out, spec.settings.validation, spec.accelerator.num_processes
    if held_out is None:
        return None
    config, num_clips = spec.configs.transformer, len(held_out.clips)
    num_passes = spec.state.validation_passes
    if flags.validation_dataset_file:  # all of these clips were asked for
        num_passes = num_clips * len(QUANTILES)
    # Every pass counts as one of the largest clip, and a step without what only some memory settings compute.
    of_pass = max(count_forward_flops(config, count_tokens(config, bucket)) for bucket in held_out.buckets.counts)
    of_epoch = sum(
        count * count_flops(config, count_tokens(config, bucket), **spec.flops_settings, recomputes_last=False)
        for bucket, count in sampler.samples_per_epoch.items()
    )
    of_rank = of_epoch / num_ranks / schedule.steps_per_epoch * total_steps
    most_passes = SHARE * of_rank / of_pass
    losses = schedule_losses(num_clips, most_passes, total_steps, num_ranks=num_ranks, num_passes=num_passes)
    losses = replace(losses, flops=math.ceil(len(losses.pairs) / num_ranks) * of_pass)
    when = flags.validation_steps, flags.validation_epochs
    if flags.prompts or not spec.is_validated or not any(when):
        return losses
    steps = range(1, total_steps)
    count = losses.count + sum(schedule.is_due(s, *when) and not losses.is_due(s, total_steps) for s in steps)
    return replace(losses, count=count, share=losses.share * count / losses.count)
