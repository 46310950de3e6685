"""The configuration of DeepSpeed, and safe loading of its checkpoints; for runs see test_distributed.py."""

import pickle
from types import SimpleNamespace

import pytest
import torch

from methods.lora import Lora
from models.source import ModelSource
from parallel.deepspeed import configure_zero, count_weights, errors_later, weights_only_loads
from parallel.fsdp import autocast_forward
from tiny_steps import train_step, with_adapters


def configured(config: dict, **changed) -> dict:
    settings = {"is_rounded": False, "batch_size": 3, "accumulation": 4, "max_grad_norm": 0.5}
    accelerator = SimpleNamespace(num_processes=2, deepspeed_plugin=SimpleNamespace(deepspeed_config=config))
    configure_zero(accelerator, **settings | changed)
    return config


@pytest.mark.parametrize(("is_rounded", "max_grad_norm"), [(False, 0.5), (True, 0.0)])
def test_the_flags_reach_deepspeed(is_rounded, max_grad_norm):
    config = {"zero_optimization": {"stage": 2}, "gradient_clipping": "auto"}
    configured(config, is_rounded=is_rounded, max_grad_norm=max_grad_norm)
    assert config["train_micro_batch_size_per_gpu"] == 3
    assert config["gradient_accumulation_steps"] == 4
    assert config["train_batch_size"] == 24
    assert config["gradient_clipping"] == max_grad_norm
    assert config["bf16"] == {"enabled": is_rounded, "check_grad_overflow": is_rounded}
    assert (config["communication_data_type"], config["data_types"]["grad_accum_dtype"]) == ("fp32", "fp32")


@pytest.mark.parametrize(("zero", "overlaps"), [({"stage": 2}, True), ({"stage": 2, "overlap_comm": False}, False)])
def test_gradients_are_exchanged_during_the_backward_pass_on_gpus(monkeypatch, zero, overlaps):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert configured({"zero_optimization": zero})["zero_optimization"]["overlap_comm"] is overlaps


def test_settings_of_the_user_are_kept():
    zero = {"stage": 3, "reduce_bucket_size": 7, "stage3_prefetch_bucket_size": "auto"}
    config = configured({"zero_optimization": zero, "communication_data_type": "bf16"})
    assert config["zero_optimization"] == {"stage": 3, "reduce_bucket_size": 7}
    assert config["communication_data_type"] == "bf16"


def test_under_autocast_adapters_in_float32_work_on_a_base_in_bf16(tiny_models):
    transformer = ModelSource(str(tiny_models("5b"))).load_transformer(torch.bfloat16)
    Lora(4, 4.0).attach(transformer)
    autocast_forward(transformer, torch.device("cpu"), torch.bfloat16)
    output, gradients = train_step(transformer)
    assert output.dtype == torch.float32
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}


def test_sharded_weights_are_counted(tiny_models):
    transformer = with_adapters(tiny_models("5b"))
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
    with pytest.raises(OSError, match="No space left"), errors_later(engine):
        engine.checkpoint_engine.save(state_dict={}, path="module")  # DeepSpeed calls it in both ways
        engine.checkpoint_engine.save({}, "optimizer")
        engine._copy_recovery_script("folder")
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
