"""Two network namespaces as two machines, with and without a shared folder; each launches its half as users do."""

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from prepared.read_index import read_index
from repository import ROOT


pytestmark = pytest.mark.slow
PORT = 29500
NOT_SHARED = "of rank 1 on node1 is not the folder of rank 0 on node0; pass a folder that all machines share"
# Set the host's name, and mount an empty folder over one that is not shared.
ENTER = 'hostname "$0"; [ -z "$UNSHARED" ] || mount -t tmpfs none "$UNSHARED"; exec "$@"'


@dataclass(frozen=True)
class Host:
    rank: int
    namespace: str
    name: str
    address: str
    device: str

    def start(self, command: Sequence[str], log: Path, **environment: str) -> subprocess.Popen:
        inside = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "--mount", "bash", "-c", ENTER, self.name]
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        own = {"PATH": path, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "UNSHARED": ""}
        # gloo would look for the device of the host's name, which no name server knows here.
        own |= {"GLOO_SOCKET_IFNAME": self.device, "COGVIDEOX_FACTORY_CACHE": str(log.with_suffix(".cache"))}
        own |= {"MACHINE_RANK": str(self.rank)}
        with log.open("w") as output:
            return subprocess.Popen(
                [*inside, *command], cwd=ROOT, env=os.environ | own | environment, stdout=output, stderr=output
            )


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@pytest.fixture(scope="module")
def hosts() -> Iterator[list[Host]]:
    suffix = str(os.getpid())
    pair = [
        Host(rank, f"cogvideox-{suffix}-{rank}", f"node{rank}", f"10.213.7.{rank + 1}", f"v{suffix}-{rank}")
        for rank in range(2)
    ]
    try:
        try:
            for host in pair:
                ip("netns", "add", host.namespace)
            ip("link", "add", pair[0].device, "type", "veth", "peer", "name", pair[1].device)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = (getattr(error, "stderr", None) or str(error).encode()).decode().strip()
            pytest.skip(f"needs root and network namespaces: {reason}")
        for host in pair:
            ip("link", "set", host.device, "netns", host.namespace)
            ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", host.device)
            for device in ("lo", host.device):
                ip("-n", host.namespace, "link", "set", device, "up")
        yield pair
    finally:
        for host in pair:
            subprocess.run(["ip", "netns", "del", host.namespace], capture_output=True)


def run_on(
    hosts: Sequence[Host], folder: Path, *command: str, of_second: dict[str, str] | None = None, **shared: str
) -> tuple[list[int], list[str]]:
    logs = [folder / f"{host.name}.log" for host in hosts]
    shared |= {"MAIN_PROCESS_IP": hosts[0].address, "MAIN_PROCESS_PORT": str(PORT)}
    runs = [
        host.start(command, log, **shared | (of_second or {} if host.rank == 1 else {}))
        for host, log in zip(hosts, logs, strict=True)
    ]
    return [run.wait() for run in runs], [log.read_text() for log in logs]


TINY = {"HEIGHT_BUCKETS": "64", "WIDTH_BUCKETS": "96", "FRAME_BUCKETS": "17", "MAX_NUM_FRAMES": "17", "DTYPE": "fp32"}
TINY |= {"HEIGHT": "64", "WIDTH": "96", "NUM_FRAMES": "17", "MIXED_PRECISION": "no", "NUM_WORKERS": "0"}


@pytest.fixture(scope="module")
def prepared(hosts, tiny_models, demo_clips, tmp_path_factory) -> tuple[Path, list[str]]:
    folder = tmp_path_factory.mktemp("prepared")
    settings = TINY | {"MODEL_ID": str(tiny_models("5b")), "DATA_ROOT": str(demo_clips), "NUM_MACHINES": "2"}
    settings |= {"OUTPUT_DIR": str(folder / "out")}
    (folder / "out").mkdir()
    launch = ("bash", "prepare_dataset.sh")
    codes, outputs = run_on(hosts, folder, *launch, **settings, of_second={"UNSHARED": str(folder / "out")})
    assert all(codes)
    assert all(NOT_SHARED in output for output in outputs), outputs

    codes, outputs = run_on(hosts, folder, *launch, **settings)
    assert codes == [0, 0], outputs
    return folder / "out", outputs


def test_two_machines_prepare_one_data_set(prepared):
    folder, outputs = prepared
    assert "16/16" in outputs[0]
    assert sum("prepared 16 samples" in output for output in outputs) == 1
    assert len(read_index(folder)) == 16
    assert not list(folder.rglob(".*"))


def test_two_machines_train_one_model(hosts, prepared, tiny_models, tmp_path):
    settings = TINY | {"MODEL_PATH": str(tiny_models("5b")), "DATA_ROOT": str(prepared[0]), "NUM_PROCESSES": "2"}
    settings |= {"OUTPUT_ROOT": str(tmp_path / "runs"), "MAX_TRAIN_STEPS": "4", "LORA_RANK": "4"}
    settings |= {"ACCELERATE_CONFIG": "accelerate_configs/ddp_2_machines.yaml", "CHECKPOINTING_STEPS": "2"}
    launch = ("bash", "train_text_to_video_lora.sh", "--nccl_timeout", "120", "--num_inference_steps", "1")
    (tmp_path / "runs").mkdir()
    codes, outputs = run_on(hosts, tmp_path, *launch, **settings, of_second={"UNSHARED": str(tmp_path / "runs")})
    assert all(codes)
    assert all(NOT_SHARED in output for output in outputs), outputs

    codes, outputs = run_on(hosts, tmp_path, *launch, **settings, of_second={"SEED": "43"})
    assert all(codes)
    differing = "error: rank 1 on node1 was not started as rank 0 on node0: --seed 43, there 42;"
    assert all(differing in output for output in outputs), outputs

    codes, outputs = run_on(hosts, tmp_path, *launch, **settings)
    assert codes == [0, 0], outputs
    (run,) = (tmp_path / "runs").iterdir()
    assert "devices     2 x cpu" in outputs[0]
    assert (run / "pytorch_lora_weights.safetensors").is_file()
    assert sorted(path.name for path in run.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
