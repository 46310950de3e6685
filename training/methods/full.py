"""Full fine-tuning: train all weights of the transformer, write them as a transformer folder."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from diffusers import CogVideoXTransformer3DModel
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file

from common.files import replace_folder
from common.run_folder import PIPELINE_FOLDER, TRANSFORMER_FOLDER
from methods.pipeline_folder import find_components, write_pipeline
from models.configs import DTYPES, ModelConfigs
from models.source import ModelSource
from parallel.fsdp import shard_like


_WEIGHTS = "diffusion_pytorch_model{suffix}.safetensors"  # the names that diffusers looks for


@dataclass(frozen=True)
class FullFinetune:
    """All weights of the transformer; the forward pass computes in the precision of the run."""

    save_pipeline: bool = False  # write a complete pipeline at the end, not only the transformer
    weights_dtype: str = "fp32"  # of the trained weights; bf16 needs stochastic rounding
    max_shard_size: str = "10GB"  # of the transformer's files
    index: Mapping[str, object] = field(default_factory=dict)  # what differs in the pipeline's model_index.json

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to load the transformer in: that of the trained weights."""
        return DTYPES[self.weights_dtype]

    def result_dtype(self, compute_dtype: torch.dtype, source: ModelSource) -> torch.dtype:
        """Return the dtype of the result: that of the base model's files."""
        return source.native_dtype()

    @property
    def settings(self) -> dict[str, str]:
        """The settings, by flag, that a resumed run must share with its checkpoint."""
        return {"method": "full fine-tuning", "--weights_dtype": self.weights_dtype}

    def check_model(self, configs: ModelConfigs, source: ModelSource) -> None:
        """Find or download the other components of the pipeline to be written, or raise a UserError."""
        if self.save_pipeline:
            find_components(source)

    def attach(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Make every parameter trainable."""
        transformer.requires_grad_(True)

    def weight_names(self, transformer: CogVideoXTransformer3DModel) -> list[str]:
        """Return the names of the weights that `save` writes, as in the transformer's `state_dict`."""
        return list(transformer.state_dict())

    def save(
        self,
        transformer: CogVideoXTransformer3DModel,
        folder: Path,
        dtype: torch.dtype,
        weights: Mapping[str, torch.Tensor] | None = None,
        source: ModelSource | None = None,
    ) -> Path:
        """Write the transformer for `CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")`.

        Args:
            weights: those of `weight_names`; None for the transformer's own.
            source: of the base model, at the end of a run: with `save_pipeline`, also write the complete pipeline;
                raise a UserError if it cannot be written, while the transformer is complete.
        """
        partial, result = folder / f".partial.{TRANSFORMER_FOLDER}", folder / TRANSFORMER_FOLDER
        shutil.rmtree(partial, ignore_errors=True)  # of a save that was killed
        transformer.save_config(partial)
        # On the CPU: a second copy of all weights may not fit on the device.
        weights = transformer.state_dict() if weights is None else weights
        weights = {name: weight.to("cpu", dtype) for name, weight in weights.items()}
        save_torch_state_dict(weights, partial, filename_pattern=_WEIGHTS, max_shard_size=self.max_shard_size)
        replace_folder(partial, result)
        if not (source and self.save_pipeline):
            return result
        return write_pipeline(source, result, folder / PIPELINE_FOLDER, self.index)

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        """Load what `save` wrote; raise a ValueError if the files belong to another transformer."""
        own = transformer.state_dict()
        missing = {name: weight.shape for name, weight in own.items()}
        for file in sorted((folder / TRANSFORMER_FOLDER).glob("*.safetensors")):
            weights = load_file(file)
            if any(missing.pop(name, None) != weight.shape for name, weight in weights.items()):
                raise ValueError(f"{file} holds weights of another transformer")
            with torch.no_grad():
                for name, weight in weights.items():  # one by one: each goes to the device unsharded
                    own[name].copy_(shard_like(weight, own[name]))
        if missing:
            raise ValueError(f"{folder / TRANSFORMER_FOLDER} lacks {len(missing)} weights, {min(missing)} among them")

    def usage(
        self, pipeline_class: str, model_path: str, folder: Path | str, model_changes: Sequence[str] = ()
    ) -> list[str]:
        """Return the code that loads the result from the run's folder or its hub repository (without pipeline).

        `model_changes` are ignored; the result's config includes them.
        """
        if self.save_pipeline and isinstance(folder, Path):
            pipeline = folder / PIPELINE_FOLDER
            return [f'pipe = {pipeline_class}.from_pretrained("{pipeline}", dtype=torch.bfloat16).to("cuda")']
        return [
            f'transformer = CogVideoXTransformer3DModel.from_pretrained("{folder}", subfolder="{TRANSFORMER_FOLDER}", '
            "dtype=torch.bfloat16)",
            f'pipe = {pipeline_class}.from_pretrained("{model_path}", transformer=transformer, '
            'dtype=torch.bfloat16).to("cuda")',
        ]
