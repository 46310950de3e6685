"""What is trainable, and what a run writes at its end."""

from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from files import replace_folder, written_whole
from models import ModelSource
from run_folder import LORA_FILE, TRANSFORMER_FOLDER


# As diffusers names the files that `from_pretrained` looks for.
_WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"


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

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """What to load the transformer in: frozen, it needs no more precision than the computation."""
        return compute_dtype

    def result_dtype(self, compute_dtype: torch.dtype, source: ModelSource) -> torch.dtype:
        """What to store the result in: what the model samples in beside it."""
        return compute_dtype

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

    def usage(self, pipeline_class: str, model_path: str, folder: Path) -> list[str]:
        """The code that loads the result, to be printed at the end of the run."""
        return [
            f'pipe = {pipeline_class}.from_pretrained("{model_path}", dtype=torch.bfloat16).to("cuda")',
            f'pipe.load_lora_weights("{folder}")',
        ]


class FullFinetune:
    """All weights of the transformer, in float32; the forward pass computes in the precision of the run."""

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """What to load the transformer in: half-precision weights would lose small updates."""
        return torch.float32

    def result_dtype(self, compute_dtype: torch.dtype, source: ModelSource) -> torch.dtype:
        """What to store the result in: the dtype of the model's own files."""
        return source.native_dtype()

    @property
    def settings(self) -> dict[str, str]:
        """What a resumed run must have in common with its checkpoint, by flag."""
        return {"method": "full fine-tuning"}

    def attach(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Make every parameter trainable."""
        transformer.requires_grad_(True)

    def save(self, transformer: CogVideoXTransformer3DModel, folder: Path, dtype: torch.dtype) -> Path:
        """Write the transformer as `CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")` loads it.

        Args:
            transformer: what was trained.
            folder: where `transformer/` goes, in shards of at most 10 GB.
            dtype: to store the weights in.
        """
        partial, result = folder / f".partial.{TRANSFORMER_FOLDER}", folder / TRANSFORMER_FOLDER
        transformer.save_config(partial)
        weights = {name: weight.to(dtype) for name, weight in transformer.state_dict().items()}
        save_torch_state_dict(weights, partial, filename_pattern=_WEIGHTS, max_shard_size="10GB")
        replace_folder(partial, result)
        return result

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        """Load what `save` wrote.

        Raises:
            ValueError: the files are not of this transformer.
        """
        missing = {name: weight.shape for name, weight in transformer.state_dict().items()}
        for file in sorted((folder / TRANSFORMER_FOLDER).glob("*.safetensors")):
            weights = load_file(file)
            if any(missing.pop(name, None) != weight.shape for name, weight in weights.items()):
                raise ValueError(f"{file} holds weights of another transformer")
            transformer.load_state_dict(weights, strict=False)
        if missing:
            raise ValueError(f"{folder / TRANSFORMER_FOLDER} lacks {len(missing)} weights, {min(missing)} among them")

    def usage(self, pipeline_class: str, model_path: str, folder: Path) -> list[str]:
        """The code that loads the result, to be printed at the end of the run."""
        return [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained("{folder / TRANSFORMER_FOLDER}", '
            "dtype=torch.bfloat16)",
            f'pipe = {pipeline_class}.from_pretrained("{model_path}", transformer=transformer, '
            'dtype=torch.bfloat16).to("cuda")',
        ]
