"""The rows of the memory tables: the runs, most important first, and the figures that others published."""

from dataclasses import dataclass, field


SIZE = (49, 480, 720)  # frames, height, width
LOW_BIT = ("--use_8bit", "--use_torchao")
SMALLEST_FULL = ("--weights_dtype", "bf16", "--step_in_backward", "--offload_checkpoints")
FACTORY, FINETRAINERS, COGVIDEO = "original factory", "finetrainers", "CogVideo"


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    model: str  # a kind for make_full_size_model
    method: str  # lora, sft
    flags: tuple[str, ...] = ()  # besides those of all rows
    task: str = "text-to-video"
    rank: int = 64
    size: tuple[int, int, int] = SIZE
    batch_size: int = 1
    is_sampled: bool = True  # whether it validates
    steps: tuple[int, int] = (2, 2)  # warm-up and timed; the first one allocates the optimizer's states
    card_gb: int | None = None  # use no more memory than a card of this size has
    # trainer -> GB of training, and with validation; None if unpublished, "out of memory" on 80 GB
    published: dict[str, tuple[float | str, float | None]] = field(default_factory=dict)


CHECKPOINTED = ("--gradient_checkpointing",)
CPU_OFFLOADED = ("--use_cpu_offload_optimizer", "--offload_gradients")

ROWS = (
    Row("5b LoRA", "5b", "lora", CHECKPOINTED, published={FACTORY: (20.8, 30.3)}),
    Row("5b LoRA, offloaded checkpoints", "5b", "lora", (*CHECKPOINTED, "--offload_checkpoints")),
    Row(
        "5b LoRA, int8, streamed blocks",
        "5b",
        "lora",
        (*CHECKPOINTED, "--offload_checkpoints", "--quantize_base", "int8", "--stream_blocks"),
    ),
    Row("2b LoRA", "2b", "lora", CHECKPOINTED, published={FACTORY: (13.0, 21.6)}),
    Row("5b full, bf16 weights, 8-bit, step in backward", "5b", "sft", (*CHECKPOINTED, *LOW_BIT, *SMALLEST_FULL)),
    Row("2b full, 8-bit", "2b", "sft", (*CHECKPOINTED, *LOW_BIT), published={FACTORY: (16.4, 27.6)}),
    Row("2b full, bf16 weights, 8-bit, step in backward", "2b", "sft", (*CHECKPOINTED, *LOW_BIT, *SMALLEST_FULL)),
    Row("2b full, AdamW", "2b", "sft", CHECKPOINTED, published={FACTORY: (33.9, 43.8), COGVIDEO: (36.0, None)}),
    Row("5b full, 8-bit", "5b", "sft", (*CHECKPOINTED, *LOW_BIT), published={FACTORY: (52.8, 58.6)}),
    Row(
        "5b full, bf16 weights, 8-bit, CPU-offloaded",
        "5b",
        "sft",
        (
            *(*CHECKPOINTED, *LOW_BIT, "--weights_dtype", "bf16", "--offload_checkpoints"),
            *CPU_OFFLOADED,
        ),
    ),
    # May exceed the host memory: pinned copies are rounded up to powers of two.
    Row(
        "5b full, CPU-offloaded",
        "5b",
        "sft",
        (*CHECKPOINTED, *CPU_OFFLOADED),
        published={FACTORY: (39.4, 48.3), COGVIDEO: (42.0, None)},
    ),
    Row(
        "5b full, bf16 weights, 8-bit",
        "5b",
        "sft",
        (*CHECKPOINTED, *LOW_BIT, "--weights_dtype", "bf16"),
        published={FACTORY: (52.8, 58.6)},
    ),
    Row(
        "5b full, bf16 weights, AdamW",
        "5b",
        "sft",
        (*CHECKPOINTED, "--use_torchao", "--weights_dtype", "bf16"),
        published={FACTORY: ("out of memory", None), FINETRAINERS: (53.0, None)},
    ),
    Row(
        "5b LoRA, nf4, offloaded checkpoints",
        "5b",
        "lora",
        (*CHECKPOINTED, "--offload_checkpoints", "--quantize_base", "nf4"),
    ),
    Row(
        "5b full, bf16 weights, 4-bit, step in backward",
        "5b",
        "sft",
        (*CHECKPOINTED, "--use_4bit", "--use_torchao", *SMALLEST_FULL),
    ),
    Row(
        "2b full, bf16 weights, 8-bit",
        "2b",
        "sft",
        (*CHECKPOINTED, *LOW_BIT, "--weights_dtype", "bf16"),
        published={FACTORY: (16.4, 27.6)},
    ),
    Row("5b LoRA, int8", "5b", "lora", (*CHECKPOINTED, "--quantize_base", "int8")),
    Row("5b LoRA, every second block checkpointed", "5b", "lora", (*CHECKPOINTED, "--checkpoint_every", "2")),
    Row("5b LoRA, nothing checkpointed", "5b", "lora", published={FACTORY: ("out of memory", None)}),
    Row(
        "5b LoRA, rank 128",
        "5b",
        "lora",
        CHECKPOINTED,
        rank=128,
        published={FINETRAINERS: (20.7, 28.3), COGVIDEO: (24.0, None)},
    ),
    Row(
        "5b LoRA, rank 128, fp8, 49x512x768",
        "5b",
        "lora",
        (*CHECKPOINTED, "--quantize_base", "fp8"),
        rank=128,
        size=(49, 512, 768),
        is_sampled=False,
        published={FINETRAINERS: (18.0, None)},
    ),
    Row("2b LoRA, rank 128", "2b", "lora", CHECKPOINTED, rank=128, published={COGVIDEO: (16.0, None)}),
    Row("5b LoRA, fp8", "5b", "lora", (*CHECKPOINTED, "--quantize_base", "fp8")),
    Row(
        "5b LoRA, attention kept",
        "5b",
        "lora",
        (*CHECKPOINTED, "--checkpoint_scope", "all-but-attention"),
    ),
    Row("5b LoRA, segments of two blocks", "5b", "lora", (*CHECKPOINTED, "--checkpoint_scope", "segment")),
    Row("5b LoRA, feed-forward checkpointed", "5b", "lora", (*CHECKPOINTED, "--checkpoint_scope", "feed-forward")),
    Row(
        "5b full, AdamW",
        "5b",
        "sft",
        CHECKPOINTED,
        published={FACTORY: ("out of memory", None), FINETRAINERS: (53.0, None)},
    ),
    Row("5b full, 4-bit", "5b", "sft", (*CHECKPOINTED, "--use_4bit", "--use_torchao")),
    Row("5b full, fp8 states", "5b", "sft", (*CHECKPOINTED, "--use_fp8", "--use_torchao")),
    Row(
        "5b full, 8-bit of bitsandbytes", "5b", "sft", (*CHECKPOINTED, "--use_8bit"), published={FACTORY: (52.8, 58.6)}
    ),
    *(
        Row(f"{model} control {name}", model, method, (*CHECKPOINTED, *flags), task="control-to-video")
        for model, name, method, flags in (
            ("5b", "LoRA", "lora", ()),
            ("2b", "LoRA", "lora", ()),
            ("5b", "full, bf16 weights, 8-bit", "sft", (*LOW_BIT, "--weights_dtype", "bf16")),
            ("2b", "full, 8-bit", "sft", LOW_BIT),
        )
    ),
    # The other rows of the original factory's tables for one GPU.
    *(
        Row(f"{model} LoRA, rank {rank}", model, "lora", CHECKPOINTED, rank=rank, published={FACTORY: figures})
        for model, rank, figures in (
            ("2b", 16, (12.9, 21.1)),
            ("2b", 256, (13.1, 22.3)),
            ("5b", 16, (19.7, 28.7)),
            ("5b", 256, (22.1, 31.9)),
        )
    ),
    Row("2b LoRA, nothing checkpointed", "2b", "lora", published={FACTORY: (44.3, 47.5)}),
    *(
        Row(f"{model} LoRA, {name}", model, "lora", (*CHECKPOINTED, *flags), published={FACTORY: figures})
        for model, name, flags, figures in (
            ("2b", "8-bit", ("--use_8bit",), (13.0, 21.3)),
            ("2b", "CPU-offloaded", CPU_OFFLOADED, (13.0, 20.9)),
            ("5b", "8-bit", ("--use_8bit",), (20.8, 29.4)),
            ("5b", "CPU-offloaded", CPU_OFFLOADED, (20.0, 29.1)),
        )
    ),
    Row("2b full, CPU-offloaded", "2b", "sft", (*CHECKPOINTED, *CPU_OFFLOADED), published={FACTORY: (16.4, 26.1)}),
    *(
        Row(f"{name}, batch 4", name[:2], method, (*CHECKPOINTED, *flags), batch_size=4, published={FACTORY: figures})
        for name, method, flags, figures in (
            ("2b LoRA", "lora", (), (22.3, 22.3)),
            ("5b LoRA", "lora", (), (47.8, 47.8)),
            ("2b full, AdamW", "sft", (), (38.3, 48.3)),
            ("2b full, 8-bit", "sft", LOW_BIT, (27.9, 28.0)),
            ("5b full, 8-bit", "sft", LOW_BIT, (66.6, 66.7)),
            ("5b full, CPU-offloaded", "sft", CPU_OFFLOADED, (66.6, 66.7)),
        )
    ),
)
