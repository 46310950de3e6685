"""What is trainable, and what a run writes at its end."""

from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

from files import written_whole
from run_folder import LORA_FILE


class Lora:
    """Low-rank adapters on the attention projections; the base model stays frozen.

    Args:
        rank: of the two factors.
        alpha: the adapters' output is scaled by alpha / rank.

    Source: https://arxiv.org/abs/2106.09685, through peft.
    """

    target_modules = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, rank: int, alpha: float):
        self.rank = rank
        self.alpha = alpha

    @property
    def settings(self) -> dict[str, float]:
        """What a resumed run must have in common with its checkpoint, by flag."""
        return {"--rank": self.rank, "--lora_alpha": self.alpha}

    def attach(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Freeze the transformer and add trainable adapters in float32 to it."""
        transformer.requires_grad_(False)
        transformer.add_adapter(
            LoraConfig(r=self.rank, lora_alpha=self.alpha, target_modules=list(self.target_modules))
        )
        # Half-precision parameters would lose small updates, and fp16 gradients cannot be unscaled.
        cast_training_params(transformer, dtype=torch.float32)

    def save(self, transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype) -> Path:
        """Write the LoRA in the diffusers format, rank and alpha in its metadata, so that
        `CogVideoXPipeline.load_lora_weights(folder)` applies it at the strength it was trained with.

        Args:
            transformer: with the adapters.
            folder: where `pytorch_lora_weights.safetensors` goes.
            dtype: to store the weights in.
        """
        layers = {name: weight.to(dtype) for name, weight in get_peft_model_state_dict(transformer).items()}
        with written_whole(folder / LORA_FILE) as path:
            CogVideoXPipeline.save_lora_weights(
                path.parent,
                transformer_lora_layers=layers,
                weight_name=path.name,
                **_collate_lora_metadata({"transformer": transformer}),
            )
        return folder / LORA_FILE

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        """Load what `save` wrote into a transformer that has the adapters.

        Raises:
            ValueError: the file's adapters are not those of the transformer.
        """
        weights = CogVideoXPipeline.lora_state_dict(folder, weight_name=LORA_FILE)
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        expected = get_peft_model_state_dict(transformer)
        if {n: w.shape for n, w in weights.items()} != {n: w.shape for n, w in expected.items()}:
            raise ValueError(f"{folder / LORA_FILE} holds adapters of another rank or of other modules")
        set_peft_model_state_dict(transformer, weights)

    def usage(self, model_path: str, folder: Path) -> str:
        """The code that loads the result, to be printed at the end of the run."""
        return (
            f'pipe = CogVideoXPipeline.from_pretrained("{model_path}", dtype=torch.bfloat16).to("cuda")\n'
            f'pipe.load_lora_weights("{folder}")'
        )
