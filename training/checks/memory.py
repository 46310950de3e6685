"""Checks of the flags on the optimizer and on memory; none needs a model."""

from dataclasses import replace

from common.errors import UserError
from common.ranks import launch_size, uses_deepspeed, uses_fsdp
from flags.optimizer import LOW_BITS, OptimizerFlags
from flags.settings import TrainingSettings


def check_optimizer(settings: TrainingSettings) -> None:
    """Check that the optimizer supports the flags passed with it."""
    _check_low_bits(settings.optimizer)
    _check_early_gradients(settings)
    _check_offload(settings)
    _check_weights_dtype(settings)
    _check_choice(settings)


def _check_low_bits(flags: OptimizerFlags) -> None:
    bits = [name for name in LOW_BITS if getattr(flags, name)]
    if len(bits) > 1:
        raise UserError(f"--{bits[0]} and --{bits[1]}: only one is possible; omit the other")
    for name in (*LOW_BITS, "use_cpu_offload_optimizer", "step_in_backward"):
        if getattr(flags, name) and flags.optimizer not in ("adam", "adamw"):
            raise UserError(f"--{name}: not available for {flags.optimizer}; use --optimizer adamw or omit it")
    for name in ("use_4bit", "use_fp8"):
        if getattr(flags, name) and not flags.use_torchao:
            raise UserError(f"--{name}: only torchao has such an optimizer; add --use_torchao")


def _check_early_gradients(settings: TrainingSettings) -> None:
    """Check the optimizers that take gradients before the backward pass is over."""
    flags = settings.optimizer
    if flags.step_in_backward and flags.use_cpu_offload_optimizer:
        raise UserError("--step_in_backward: not with --use_cpu_offload_optimizer; use --offload_gradients instead")
    _check_accumulation(settings, "step_in_backward")
    if flags.step_in_backward and "max_grad_norm" in settings.given and flags.max_grad_norm:
        raise UserError("--max_grad_norm: the norm over all gradients is unknown with --step_in_backward; omit one")
    for name in ("use_cpu_offload_optimizer", "step_in_backward"):
        if getattr(flags, name) and settings.training.mixed_precision == "fp16":
            raise UserError(f"--{name}: takes gradients before fp16 unscales them; use --mixed_precision bf16")
        if getattr(flags, name) and launch_size() > 1:
            raise UserError(f"--{name}: takes gradients before processes average them; launch one process, or omit it")


def _check_offload(settings: TrainingSettings) -> None:
    flags = settings.optimizer
    if flags.use_cpu_offload_optimizer and flags.use_8bit and not flags.use_torchao:
        raise UserError("--use_cpu_offload_optimizer: needs torchao's 8 bits; add --use_torchao or omit --use_8bit")
    if flags.offload_gradients and not flags.use_cpu_offload_optimizer:
        raise UserError("--offload_gradients: needs the offloaded optimizer; add --use_cpu_offload_optimizer")
    _check_accumulation(settings, "offload_gradients")


def _check_accumulation(settings: TrainingSettings, name: str) -> None:
    if getattr(settings.optimizer, name) and settings.training.gradient_accumulation_steps > 1:
        raise UserError(
            f"--{name}: frees gradients after each backward pass; use --gradient_accumulation_steps 1 or omit it"
        )


def _check_weights_dtype(settings: TrainingSettings) -> None:
    """Check that weights in bf16 are rounded stochastically; DeepSpeed keeps float32 copies instead."""
    flags, weights = settings.optimizer, "--weights_dtype bf16"
    if settings.memory.weights_dtype != "bf16" or uses_deepspeed():
        return
    if flags.optimizer not in ("adam", "adamw"):
        raise UserError(
            f"{weights}: {flags.optimizer} does not round stochastically, so small updates would be lost; use "
            "--optimizer adamw --use_torchao"
        )
    if not flags.use_torchao:
        raise UserError(f"{weights}: only torchao's optimizers round stochastically; add --use_torchao")
    if flags.optimizer == "adam" and not any(getattr(flags, name) for name in LOW_BITS):
        raise UserError(f"{weights}: torchao's adam needs low-bit states; use --optimizer adamw or add --use_8bit")
    if settings.training.mixed_precision in ("no", "fp16"):
        raise UserError(f"{weights}: the networks must compute in bf16 too; use --mixed_precision bf16")
    if settings.objective.use_ema:
        raise UserError("--use_ema: bf16 would round away the average's updates; omit it or use --weights_dtype fp32")


def _check_choice(settings: TrainingSettings) -> None:
    """Check that no flag belongs to another optimizer than the one chosen."""
    flags = settings.optimizer
    if "beta3" in settings.given and flags.optimizer not in ("prodigy", "came"):
        raise UserError(f"--beta3: {flags.optimizer} has no third beta; omit it or use --optimizer prodigy or came")
    for name in ("prodigy_decouple", "prodigy_use_bias_correction", "prodigy_safeguard_warmup"):
        if getattr(flags, name) and flags.optimizer != "prodigy":
            raise UserError(f"--{name}: no effect on {flags.optimizer}; omit it or use --optimizer prodigy")
    if flags.optimizer == "schedulefree" and settings.objective.use_ema:
        raise UserError("--use_ema: schedulefree already averages the weights; omit it or use --optimizer adamw")
    if flags.optimizer == "schedulefree" and flags.beta1 == 0:
        raise UserError("--beta1: schedulefree divides by it; pass more than 0")


def settle_memory(settings: TrainingSettings) -> TrainingSettings:
    """Return the settings with the defaults that depend on other flags: the checkpoint interval, no clipping."""
    memory, optimizer = settings.memory, settings.optimizer
    if memory.checkpoint_every is None:
        memory = replace(memory, checkpoint_every=2 if memory.checkpoint_scope == "segment" else 1)
    if optimizer.step_in_backward:
        optimizer = replace(optimizer, max_grad_norm=0.0)
    return replace(settings, memory=memory, optimizer=optimizer)


def check_memory(settings: TrainingSettings) -> None:
    """Check that the memory savings have what they need and can be combined."""
    memory = settings.memory
    for name in ("checkpoint_scope", "checkpoint_every", "offload_checkpoints"):
        if name in settings.given and not memory.gradient_checkpointing:
            raise UserError(f"--{name}: no effect without gradient checkpointing; add --gradient_checkpointing")
    if memory.quantize_base != "none":
        flag = f"--quantize_base {memory.quantize_base}"
        _check_launcher(flag, "quantized weights")
        if settings.lora.adapter != "lora":
            raise UserError(f"{flag}: not available for --adapter {settings.lora.adapter}; omit one of them")
        if memory.quantize_base == "nf4" and memory.stream_blocks:
            raise UserError(f"{flag}: bitsandbytes' weights cannot be streamed; use int8 or omit --stream_blocks")
    if memory.stream_blocks:
        _check_streaming(settings)
    if settings.lora.adapter != "lora":
        _check_launcher(f"--adapter {settings.lora.adapter}", "weights that peft multiplies outside their layers")
    if memory.auto_fit and launch_size() > 1:
        raise UserError(
            "--auto_fit: a process out of memory would leave the others waiting; find the settings with one process "
            "(--auto_fit --dry_run), and pass these to all"
        )


def _check_streaming(settings: TrainingSettings) -> None:
    """Check that streamed blocks are recomputed one by one."""
    memory = settings.memory
    _check_launcher("--stream_blocks", "blocks that are not on the GPU")
    is_each_checkpointed = memory.checkpoint_scope == "block" and memory.checkpoint_every in (None, 1)
    is_each_checkpointed |= memory.checkpoint_scope == "all-but-attention"
    if not memory.gradient_checkpointing or not is_each_checkpointed:
        raise UserError(
            "--stream_blocks: recomputes blocks one by one; pass --gradient_checkpointing, with --checkpoint_scope "
            "all-but-attention or without, and no --checkpoint_every"
        )
    if settings.validation.enable_model_cpu_offload:
        raise UserError("--enable_model_cpu_offload: --stream_blocks already keeps the blocks on the CPU; omit it")


def _check_launcher(flag: str, impossible: str) -> None:
    for launcher, is_used in (("DeepSpeed", uses_deepspeed()), ("FSDP", uses_fsdp())):
        if is_used:
            raise UserError(
                f"{flag}: {launcher} cannot shard {impossible}; launch with accelerate_configs/ddp.yaml or "
                "single_gpu.yaml, or omit the flag"
            )
