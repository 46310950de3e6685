import os
import subprocess
import sys

import pytest

from args import parse_args, parse_prepare_args
from common.startup import unused_libraries
from flags.schema import flag_values
from repository import TRAINING


@pytest.fixture
def flags(tmp_path) -> list[str]:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model_index.json").touch()
    (tmp_path / "clips").mkdir()
    model, clips = str(tmp_path / "model"), str(tmp_path / "clips")
    return ["--pretrained_model_name_or_path", model, "--data_root", clips, "--output_dir", str(tmp_path / "out")]


@pytest.mark.parametrize(
    ("more", "used"),
    [
        ([], set()),
        (["--use_8bit"], {"bitsandbytes"}),
        (["--use_8bit", "--use_torchao"], {"torchao"}),
        (["--use_4bit", "--use_torchao"], {"torchao"}),
        (["--use_cpu_offload_optimizer"], {"torchao"}),
        (["--quantize_base", "int8"], {"torchao"}),
        (["--quantize_base", "nf4"], {"bitsandbytes", "torchao"}),
        (["--auto_fit"], {"bitsandbytes", "torchao"}),
        (["--memory_budget_gb", "16"], {"bitsandbytes", "torchao"}),
    ],
)
def test_a_library_is_left_out_unless_a_flag_needs_it(flags, more, used):
    settings = parse_args([*flags, *more], task="text-to-video", method="lora")
    assert set(unused_libraries(flag_values(settings))) == {"bitsandbytes", "torchao", "deepspeed"} - used


def test_deepspeed_is_imported_where_accelerate_launches_it(flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "deepspeed" not in unused_libraries(flag_values(parse_args(flags, task="text-to-video", method="lora")))


def test_a_preparation_leaves_them_out_too(flags):
    settings = parse_prepare_args(flags)
    assert set(unused_libraries(flag_values(settings))) == {"bitsandbytes", "torchao", "deepspeed"}


def test_a_library_left_out_is_as_good_as_not_installed():
    code = (
        "from common import startup\n"
        "from importlib.util import find_spec\n"  # by which libraries look for one another
        "print(find_spec('bitsandbytes') is None, find_spec('torchao') is None)\n"
        "startup.prepare_imports({}, owns_process=True)\n"
        "print(find_spec('bitsandbytes') is None, find_spec('torchao') is None)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True)
    assert done.stdout == "False False\nTrue True\n", done.stderr


def test_bars_of_libraries_wait_a_moment_too():
    code = "from common import startup; startup.quiet_libraries(); import tqdm.auto; print(tqdm.auto.tqdm([]).delay)"
    path = {"PYTHONPATH": str(TRAINING)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")} | path
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 1
