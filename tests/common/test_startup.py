import gc
import logging
import os
import subprocess
import sys
import warnings
from importlib import import_module

import pytest
from diffusers import CogVideoXTransformer3DModel

from args import parse_args, parse_prepare_args
from cli.schema import flag_values
from common.startup import configure_allocator, heavy_imports, quiet_libraries, unused_libraries
from repository import TRAINING


# Of no flag: transformers and accelerate import them for what no script of ours does.
NEVER_USED = {"scipy", "sklearn", "boto3"}
OPTIONAL = {"bitsandbytes", "torchao", "deepspeed"} | NEVER_USED


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
def test_a_library_is_left_out_unless_a_flag_needs_it(flags, more, used, monkeypatch):
    settings = flag_values(parse_args([*flags, *more], task="text-to-video", method="lora"))
    monkeypatch.setattr(os.path, "exists", lambda path: False)  # no GPU
    assert set(unused_libraries(settings)) == OPTIONAL - used


@pytest.mark.parametrize(("more", "used"), [([], {"bitsandbytes", "torchao"}), (["--gradient_checkpointing"], set())])
def test_with_a_gpu_the_card_may_choose_any_of_them(flags, more, used, monkeypatch):
    settings = flag_values(parse_args([*flags, *more], task="text-to-video", method="lora"))
    monkeypatch.setattr(os.path, "exists", lambda path: path == "/dev/nvidiactl")
    assert set(unused_libraries(settings)) == OPTIONAL - used


def test_deepspeed_is_imported_where_accelerate_launches_it(flags, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert "deepspeed" not in unused_libraries(flag_values(parse_args(flags, task="text-to-video", method="lora")))


def test_a_preparation_leaves_them_out_too(flags):
    settings = parse_prepare_args(flags)
    assert set(unused_libraries(flag_values(settings))) == OPTIONAL


def test_a_library_left_out_is_as_good_as_not_installed_and_collections_skip_those_imported():
    code = (
        "from common import startup\n"
        "from importlib.util import find_spec\n"  # by which libraries look for one another
        "print(find_spec('bitsandbytes') is None, find_spec('torchao') is None)\n"
        "with startup.heavy_imports({}, owns_process=True): pass\n"
        "print(find_spec('bitsandbytes') is None, find_spec('torchao') is None)\n"
        "import gc; print(gc.get_freeze_count() > len(gc.get_objects()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TRAINING, capture_output=True, text=True)
    assert done.stdout == "False False\nTrue True\nTrue\n", done.stderr


@pytest.mark.parametrize("was_collecting", [True, False])
def test_no_garbage_is_collected_during_the_imports_even_if_one_fails(was_collecting):
    frozen = gc.get_freeze_count()
    try:
        if not was_collecting:
            gc.disable()
        with pytest.raises(ImportError), heavy_imports({}, owns_process=False):
            assert not gc.isenabled()
            raise ImportError
        assert gc.isenabled() == was_collecting
    finally:
        gc.enable()
    assert gc.get_freeze_count() == frozen  # other code of this process may still make garbage of its objects


READS, LOADS = "reading the data ...", "loading PyTorch and diffusers ..."
TRAINERS = [f"cogvideox_{task}_to_video_{method}" for task in ("text", "image") for method in ("lora", "sft")]


@pytest.mark.parametrize(
    ("command", "more", "said"),
    [
        *((trainer, ["--pretrained_model_name_or_path", "MODEL"], READS) for trainer in TRAINERS),
        ("prepare_dataset", ["--model_id", "MODEL", "--output_dir", "out"], READS),
        ("caption_dataset", ["--endpoint", "http://localhost:1/v1"], READS),
        ("make_first_frames", ["--output_dir", "out"], READS),
        ("generate", ["--pretrained_model_name_or_path", "MODEL", "--prompt", "a"], LOADS),
    ],
)
def test_a_command_says_at_once_what_it_is_busy_with(flags, tmp_path, monkeypatch, capsys, command, more, said):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger(), "level", logging.INFO)  # restored: a second rank logs only errors
    argv = [flags[1] if word == "MODEL" else word for word in more]
    argv += [] if command == "generate" else flags[2:4]  # there is no clip, and no part of the model
    main = import_module(command).main
    with pytest.raises(SystemExit, match="2"):
        main(argv)
    first, *others = capsys.readouterr().err.splitlines()
    assert (first, others[-1].split(":")[0]) == (said, "error")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for again, code in ((argv, "2"), (["--help"], "0")):
        with pytest.raises(SystemExit, match=code):
            main(again)
        assert said not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_the_allocator_extends_segments_unless_the_user_configured_it(monkeypatch, name):
    for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.setenv(known, "")  # restored afterwards
        monkeypatch.delenv(known)
    configure_allocator()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setenv(name, "max_split_size_mb:64")
    configure_allocator()
    assert [os.environ.get(known) for known in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")].count(None) == 1


def test_bars_of_libraries_wait_a_moment_too():
    code = "from common import startup; startup.quiet_libraries(); import tqdm.auto; print(tqdm.auto.tqdm([]).delay)"
    path = {"PYTHONPATH": str(TRAINING)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TQDM_")} | path
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert float(done.stdout) == 1


def test_a_model_of_the_hub_is_read_without_the_warning_about_an_argument_of_diffusers():
    with warnings.catch_warnings(record=True) as shown:
        quiet_libraries()
        with pytest.raises(OSError, match="not-here"):
            CogVideoXTransformer3DModel.load_config("org/not-here", local_files_only=True)
    assert not shown
