"""LoRA, LoKr or LoHa: train adapters on a frozen transformer, write them in the diffusers format."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline, CogVideoXTransformer3DModel
from diffusers.training_utils import _collate_lora_metadata, cast_training_params
from peft import LoHaConfig, LoKrConfig, LoraConfig, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.integrations import dequantize_module_weight
from torch.nn.parallel import DistributedDataParallel

from common.errors import UserError
from common.files import atomic_write
from common.run_folder import LORA_FILE
from flags.training import ALL_LINEAR, LOKR_FACTOR, LORA_TARGET_MODULES, LoraFlags
from methods.lora_file import PATCHES, check_starting_lora, complete_inputs, inside_block, load_lora, read_lora
from methods.lora_layers import use_layers
from models.configs import ModelConfigs
from models.quantization import check_quantization
from models.source import ModelSource


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters on some linear layers; the base model stays frozen.

    Source: https://arxiv.org/abs/2106.09685, rsLoRA https://arxiv.org/abs/2312.03732, DoRA
    https://arxiv.org/abs/2402.09353, LoKr and LoHa https://arxiv.org/abs/2309.14859, all through peft.
    """

    rank: int  # of the two factors
    alpha: float  # the adapters' output is scaled by alpha / rank
    target_modules: Sequence[str] = LORA_TARGET_MODULES  # ends of layers' names; "all-linear" for all in the blocks
    use_rslora: bool = False  # scale by alpha / sqrt(rank) instead
    use_dora: bool = False  # train the norms of the weights' rows too
    dropout: float = 0.0  # probability that an input of an adapter is dropped in training
    start_from: Path | None = None  # a LoRA file with the adapters' initial values
    adapter: str = "lora"  # lora, lokr, loha; the last two without rsLoRA, DoRA and dropout
    lokr_factor: int = LOKR_FACTOR  # size of the left matrix of a LoKr, as far as it divides the layer's
    quantize_base: str = "none"  # storage of the frozen blocks: int8, fp8, nf4
    new_inputs: int = 0  # last inputs of the patch embedding, which the task added with zero weights

    @classmethod
    def from_flags(cls, flags: LoraFlags, quantize_base: str) -> "Lora":
        """Return the LoRA that the flags describe."""
        return cls(
            rank=flags.rank,
            alpha=flags.lora_alpha,
            target_modules=list(flags.lora_target_modules),
            use_rslora=flags.use_rslora,
            use_dora=flags.use_dora,
            dropout=flags.lora_dropout,
            start_from=Path(flags.lora_weights) if flags.lora_weights else None,
            adapter=flags.adapter,
            lokr_factor=flags.lokr_factor,
            quantize_base=quantize_base,
        )

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """Return the dtype to load the frozen transformer in: that of the computation."""
        return compute_dtype

    def result_dtype(self, compute_dtype: torch.dtype, source: ModelSource) -> torch.dtype:
        """Return the dtype of the result: that which the model samples in."""
        return compute_dtype

    @property
    def settings(self) -> dict[str, object]:
        """The settings, by flag, that a resumed run must share with its checkpoint; dropout may change."""
        return {
            "--rank": self.rank,
            "--lora_alpha": self.alpha,
            "--lora_target_modules": " ".join(sorted(self.target_modules)),
            "--use_rslora": self.use_rslora,
            "--use_dora": self.use_dora,
            "--adapter": self.adapter != "lora" and self.adapter,
            "--lokr_factor": self.adapter == "lokr" and self.lokr_factor,
        }

    def check_model(self, configs: ModelConfigs, source: ModelSource) -> None:
        """Refuse missing target modules, a LoRA to start from that does not fit, and a quantization that cannot run
        here, with a UserError; load no weights of the model."""
        check_quantization(self.quantize_base)
        if self.new_inputs and (self.adapter != "lora" or self.use_dora):
            flag = "--use_dora" if self.use_dora else f"--adapter {self.adapter}"
            raise UserError(
                f"{flag}: the weights of the control's inputs are learned from zero, as a plain LoRA on the patch "
                "embedding; omit the flag, or start from a control model"
            )
        with torch.device("meta"):
            transformer = CogVideoXTransformer3DModel.from_config(configs.transformer)
            self._add_adapters(transformer)
        if self.start_from is not None:
            check_starting_lora(self.start_from, transformer)

    def attach(self, transformer: CogVideoXTransformer3DModel) -> None:
        """Freeze the transformer and add trainable float32 adapters, with the values of `start_from`."""
        transformer.requires_grad_(False)
        self._add_adapters(transformer)
        # Half-precision parameters would lose small updates, and fp16 gradients cannot be unscaled.
        cast_training_params(transformer, dtype=torch.float32)
        if self.use_dora:
            _set_magnitudes(transformer)
        if self.new_inputs:
            _select_inputs(transformer.patch_embed.proj.lora_A["default"].weight.data)
        _keep_frozen_from_ddp(transformer)
        use_layers(transformer)
        if self.start_from is not None:
            file = complete_inputs(read_lora(self.start_from), transformer)
            load_lora(transformer, file)
            logger.info("starting from %s", file.path)
            if not file.config:
                message = "warning: --lora_weights: %s has no metadata on its alpha; --lora_alpha %g is used"
                logger.warning(message, file.path, self.alpha)

    def _add_adapters(self, transformer: CogVideoXTransformer3DModel) -> None:
        modules, patterns = _find_modules(transformer, self.target_modules), {}
        if self.new_inputs:  # of this rank, factors can be any weights of these inputs, at the strength of a weight
            modules = list(dict.fromkeys([*modules, PATCHES]))
            alpha = self.new_inputs**0.5 if self.use_rslora else self.new_inputs
            patterns = {"rank_pattern": {PATCHES: self.new_inputs}, "alpha_pattern": {PATCHES: alpha}}
        if self.adapter == "lokr":
            config = LoKrConfig(
                r=self.rank, alpha=self.alpha, target_modules=modules, decompose_factor=self.lokr_factor
            )
        elif self.adapter == "loha":
            config = LoHaConfig(r=self.rank, alpha=self.alpha, target_modules=modules)
        else:
            config = LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                target_modules=modules,
                use_rslora=self.use_rslora,
                use_dora=self.use_dora,
                lora_dropout=self.dropout,
                **patterns,
            )
        transformer.add_adapter(config)

    def weight_names(self, transformer: CogVideoXTransformer3DModel) -> list[str]:
        """Return the names of the weights that `save` writes, as in the transformer's `state_dict`."""
        return [name for name, parameter in transformer.named_parameters() if parameter.requires_grad]

    def save(
        self,
        transformer: CogVideoXTransformer3DModel,
        folder: Path,
        dtype: torch.dtype,
        weights: Mapping[str, torch.Tensor] | None = None,
        source: ModelSource | None = None,
    ) -> Path:
        """Write the adapters in the diffusers format, with their config as metadata: for a LoRA,
        `load_lora_weights(folder)` applies it at the strength of the training.

        Args:
            weights: those of `weight_names`; None for the transformer's own.
            source: ignored; a LoRA does not contain its base model.
        """
        adapters = get_peft_model_state_dict(transformer, state_dict=weights)
        layers = {name: weight.to(dtype) for name, weight in adapters.items()}
        with atomic_write(folder / LORA_FILE) as path:
            CogVideoXPipeline.save_lora_weights(
                path.parent,
                transformer_lora_layers=layers,
                weight_name=path.name,
                **_collate_lora_metadata({"transformer": transformer}),
            )
        return folder / LORA_FILE

    def load(self, transformer: CogVideoXTransformer3DModel, folder: Path) -> None:
        """Load what `save` wrote into a transformer with the same adapters; raise a ValueError if it has others."""
        load_lora(transformer, read_lora(folder / LORA_FILE))

    @property
    def title(self) -> str:
        """The usual spelling of the adapter's name."""
        return {"lora": "LoRA", "lokr": "LoKr", "loha": "LoHa"}[self.adapter]

    def usage(
        self, pipeline_class: str, model_path: str, folder: Path | str, model_changes: Sequence[str] = ()
    ) -> list[str]:
        """Return the code that loads the result from the run's folder or its hub repository.

        `model_changes` is code that changes the base model as the task did before training.
        """
        start = [
            f'pipe = {pipeline_class}.from_pretrained("{model_path}", dtype=torch.bfloat16).to("cuda")',
            *model_changes,
        ]
        if self.adapter != "lora":
            config = f"{self.title}Config"
            return [
                f"from peft import {config}, set_peft_model_state_dict",
                *start,
                f"# load_lora_weights reads only LoRA; training/convert_lora.py makes one of a {self.adapter}",
                f'parts = pipe.lora_state_dict("{folder}", return_lora_metadata=True)',
                'weights, config = ({k.removeprefix("transformer."): v for k, v in part.items()} for part in parts)',
                f"pipe.transformer.add_adapter({config}(**config))",
                "set_peft_model_state_dict(pipe.transformer, weights)",
            ]
        return [
            *start,
            f'pipe.load_lora_weights("{folder}")  # applies alpha / rank, which set_adapters would multiply again',
        ]


def _find_modules(transformer: CogVideoXTransformer3DModel, names: Sequence[str]) -> list[str]:
    """Return the target modules; raise a UserError if one is not a linear layer, as peft does only if none is."""
    modules = dict(transformer.named_modules())
    layers = {name for name, layer in modules.items() if isinstance(layer, torch.nn.Linear)}
    outside = sorted(name for name in layers if not name.startswith("transformer_blocks."))
    in_blocks = sorted({inside_block(name) for name in layers.difference(outside)})
    if list(names) == [ALL_LINEAR]:
        return in_blocks
    unknown = []
    for name in names:
        config = LoraConfig(target_modules=[name])
        meant = {module for module in modules if check_target_module_exists(config, module)}
        if not meant or not meant <= layers:
            unknown.append(name)
    if unknown:
        raise UserError(
            f"--lora_target_modules: {', '.join(unknown)}: not the name of linear layers of this model; there are "
            f"{', '.join(in_blocks)} in every block, and {', '.join(outside)}"
        )
    return list(names)


def _select_inputs(down: torch.Tensor) -> None:
    """Have the first factor `[rank, inputs...]` select its last inputs, so that the second one is their weights."""
    rank = down.shape[0]
    down.view(rank, -1).copy_(torch.eye(rank, down[0].numel()).roll(down[0].numel() - rank, dims=1))


def _keep_frozen_from_ddp(transformer: CogVideoXTransformer3DModel) -> None:
    """Have DistributedDataParallel ignore frozen weights: all ranks have them, and quantized ones cannot be sent."""
    names = [name for name, parameter in transformer.named_parameters() if not parameter.requires_grad]
    names += [name for name, _ in transformer.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(transformer, names)


def _set_magnitudes(transformer: CogVideoXTransformer3DModel) -> None:
    """Make DoRA start without effect on a half-precision base: peft rounds magnitudes but not the norms under them."""
    for layer in transformer.modules():
        if isinstance(layer, LoraLayer):
            weight = dequantize_module_weight(layer.get_base_layer()).detach().float()
            layer.lora_magnitude_vector["default"].weight.data = torch.linalg.norm(weight, dim=1)
