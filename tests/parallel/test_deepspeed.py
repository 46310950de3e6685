"""The configuration of DeepSpeed, and safe loading of its checkpoints; for runs see test_distributed.py."""

import pickle
from types import SimpleNamespace

import pytest
import torch
from diffusers import CogVideoXTransformer3DModel

from methods.lora import Lora
from models.source import ModelSource
from parallel.deepspeed import configure_zero, count_weights, errors_later, weights_only_loads
from parallel.fsdp import autocast_forward


def configured(config: dict, **changed) -> dict:
    settings = {"is_rounded": False, "batch_size": 3, "accumulation": 4, "max_grad_norm": 0.5}
    accelerator = SimpleNamespace(num_processes=2, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    configure_zero(accelerator, **settings | changed)
    return config


def test_the_flags_reach_deepspeed():
    config = configured({"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"})
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == 0.5
    assert config["bf16"]["enabled"] is False
    assert (config["communication_data_type"], config["data_types"]["grad_accum_dtype"]) == ("fp32", "fp32")


def test_gradients_of_bf16_weights_are_checked_and_zero_disables_clipping():
    config = configured({"zero_optimization": {"stage": 2}}, is_rounded=True, max_grad_norm=0.0)
    assert config["bf16"] == {"enabled": True, "check_grad_overflow": True}
    assert config["gradient_clipping"] == 0


def test_settings_of_the_user_are_kept():
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}
    config = configured({"zero_optimization": zero, "communication_data_type": "bf16"})
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7}
    assert config["communication_data_type"] == "bf16"


def test_under_autocast_adapters_in_float32_work_on_a_base_in_bf16(tiny_models):
    from tiny_steps import inputs_of

    transformer = ModelSource(str(tiny_models("5b"))).load_transformer(torch.bfloat16)
    Lora(4, 4.0).attach(transformer)
    autocast_forward(transformer, torch.device("cpu"), torch.bfloat16)
    inputs = inputs_of(transformer) | {"hidden_states": inputs_of(transformer)["hidden_states"].bfloat16()}
    (output,) = transformer(**inputs, return_dict=False)
    assert output.dtype == torch.float32
    output.mean().backward()
    gradients = [parameter.grad for parameter in transformer.parameters() if parameter.requires_grad]
    assert {gradient.dtype for gradient in gradients} == {torch.float32}


def test_sharded_weights_are_counted(tiny_models):
    transformer: CogVideoXTransformer3DModel = ModelSource(str(tiny_models("5b"))).load_transformer(torch.float32)
    Lora(4, 4.0).attach(transformer)
    counts = count_weights(transformer)
    assert counts == (
        sum(parameter.numel() for parameter in transformer.parameters() if parameter.requires_grad),
        sum(parameter.numel() for parameter in transformer.parameters()),
    )
    for parameter in transformer.parameters():  # as under ZeRO-3
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert count_weights(transformer) == counts


class FullDisk:
    """A checkpoint engine that fails to write, and records the paths."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def save(self, state_dict: dict, path: str) -> None:
        self.asked.append(path)
        raise OSError(28, "No space left on device")


def test_a_process_raises_errors_of_writing_after_saving():
    engine = torch.nn.Module()
    engine.checkpoint_engine = FullDisk()
    was_there = False
    with pytest.raises(OSError, match="No space left"), errors_later(engine):
        engine.checkpoint_engine.save(state_dict={}, path="module")  # DeepSpeed calls it in both ways
        engine.checkpoint_engine.save({}, "optimizer")
        engine._copy_recovery_script("folder")
        was_there = True
    assert was_there
    assert engine.checkpoint_engine.asked == ["module", "optimizer"]
    with pytest.raises(OSError, match="No space left"):
        engine.checkpoint_engine.save({}, "as before")


class _Payload:
    def __init__(self, path: str):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_deepspeed_checkpoint_cannot_run_code(tmp_path):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from deepspeed.runtime.fp16.loss_scaler import LossScaler

    proof, file = tmp_path / "code-was-run", str(tmp_path / "mp_rank_00_model_states.pt")
    torch.save({"module": {"weight": torch.ones(2)}, "loss_scaler": LossScaler(1.0)}, file)
    with weights_only_loads():
        assert TorchCheckpointEngine().load(file)["loss_scaler"].cur_scale == 1.0
    torch.save({"module": _Payload(str(proof))}, file)
    with weights_only_loads(), pytest.raises(pickle.UnpicklingError):
        TorchCheckpointEngine().load(file)
    assert not proof.exists()
    TorchCheckpointEngine().load(file)["module"].close()  # as DeepSpeed does
    assert proof.exists()
