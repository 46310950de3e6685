"""Keep messages that say nothing to a user off the screen."""

import logging
import os


def quiet_libraries() -> None:
    """Silence known noise of libraries; called before they are imported."""
    for name in (
        "torch.utils._pytree",  # torchao registers its enums in a way that torch calls deprecated
        "diffusers.quantizers.torchao.torchao_quantizer",  # looks for classes that newer torchao moved
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not os.path.exists("/dev/nvidiactl"):
        os.environ.setdefault(
            "DS_ACCELERATOR", "cpu"
        )  # DeepSpeed, which accelerate imports, warns that it has to guess
    # Set by hand, tokenizers do not warn about the data workers' fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
