"""Print what `accelerate launch --config_file CONFIG` would tell its processes, as shell code.

    source <(python assets/slurm/accelerate_env.py accelerate_configs/ddp.yaml)

SLURM starts the processes itself, so that signals and exit codes reach them without a launcher in between; the config
still says how they share the work. How many there are and where they meet is for SLURM to say.
"""

import os
import shlex
import sys

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)


PREFIXES = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_")


def environment_of(config: str) -> dict[str, str]:
    """The variables that a config stands for.

    Args:
        config: path of the YAML.
    """
    # As on one machine with any free port: addresses and numbers are left out below.
    flags = ["--config_file", config, "--num_machines", "1", "--main_process_port", "0"]
    flags += ["--num_cpu_threads_per_process", "1", "script.py"]
    args, defaults, has_precision = _validate_launch_command(launch_command_parser().parse_args(flags))
    if args.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if has_precision else [])]
        args.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(args)
    elif args.use_fsdp or args.multi_gpu:
        environment = prepare_multi_gpu_env(args)
    else:
        _, environment = prepare_simple_launcher_cmd_env(args)
    return {name: value for name, value in environment.items() if name.startswith(PREFIXES)}


if __name__ == "__main__":
    for name, value in environment_of(sys.argv[1]).items():
        if os.environ.get(name) != value:
            print(f"export {name}={shlex.quote(value)}")
