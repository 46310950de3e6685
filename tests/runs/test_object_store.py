"""From clips in a bucket to prepared data in a bucket to batches of training, through a server that fails."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import prepare_dataset
from args import parse_args
from common.remote import default_cache_folder
from data.sampler import Draw
from dataset import make_loader, without_failures
from planning.plan import plan_training_data
from run.recipe import Recipe
from run.setup import make_dataset
from tiny_runs import SIZE


NUM_CLIPS = 2
FLAGS = [*SIZE, "--max_samples", str(NUM_CLIPS)]


@pytest.fixture(scope="module")
def model(tiny_models) -> Path:
    return tiny_models("5b")


@pytest.fixture
def clips(bucket, demo_clips) -> str:
    bucket.put_folder(demo_clips, "clips")
    return f"{bucket.url}/clips"


@pytest.fixture
def on_disk(prepared_demo) -> Path:
    return prepared_demo(*FLAGS)


def prepare(model: Path, clips: object, output: object, *flags: str):
    places = ["--model_id", str(model), "--data_root", str(clips), "--output_dir", str(output)]
    prepare_dataset.main([*places, *FLAGS, "--save_latents_and_embeddings", *flags])
    return output


def read_all(model: Path, prepared: object, *flags: str) -> dict[str, list[torch.Tensor]]:
    argv = ["--pretrained_model_name_or_path", str(model), "--data_root", str(prepared), "--load_tensors", *flags]
    settings = parse_args([*argv, "--report_to", "none"], task="text-to-video", method="lora")
    data = plan_training_data(settings)
    dataset = make_dataset(Recipe(settings, data), 0, replace_failed=False)
    batches = without_failures(
        make_loader(dataset, [[Draw(index, 0)] for index in range(len(data.clips))], num_workers=0)
    )
    return {batch.names[0]: [batch.video_moments, batch.prompt_embeds] for batch in batches}


def refusal(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit, match=r"^2$"):
        prepare(*arguments)
    return capsys.readouterr().err


def test_clips_of_a_bucket_are_prepared_in_a_bucket_and_read_by_training_as_from_disk(
    model, clips, on_disk, bucket, tmp_path
):
    prepared = prepare(model, clips, f"{bucket.url}/prepared")
    names = [file.relative_to(on_disk).as_posix() for file in on_disk.rglob("*") if file.is_file()]
    assert [key for key in bucket.listing() if key.startswith("prepared/")] == sorted(f"prepared/{n}" for n in names)
    for name in names:
        if name.endswith(".safetensors"):
            assert bucket.get(f"prepared/{name}") == (on_disk / name).read_bytes()
    assert not [file for file in (default_cache_folder() / "outgoing").rglob("*") if file.is_file()]
    expected, found = read_all(model, on_disk), read_all(model, prepared)
    assert found.keys() == expected.keys() and len(found) == NUM_CLIPS
    assert all(torch.equal(a, b) for name in found for a, b in zip(found[name], expected[name], strict=True))


def test_a_preparation_that_a_store_ended_continues_with_what_is_missing(model, demo_clips, bucket, capsys):
    url = f"{bucket.url}/prepared"
    bucket.store.faults["empty_prompt.safetensors"] = ["503"]  # tried again
    bucket.store.faults[f"PUT /{bucket.name}/prepared/prepared.json"] = ["", *["503"] * 4]  # the last file of all
    assert f"{url}/prepared.json cannot be written after 4 tries" in refusal(capsys, model, demo_clips, url)
    bucket.store.faults.clear()
    shards = [key for key in bucket.listing() if key.endswith(".safetensors")]
    bucket.delete(next(key for key in shards if "/latents/" in key))
    bucket.store.requests.clear()
    prepare(model, demo_clips, url)
    assert [key for key in bucket.listing() if key.endswith(".safetensors")] == shards
    assert len([one for one in bucket.store.requests if one.startswith("PUT") and one.endswith(".safetensors")]) == 1


def test_an_outage_ends_a_preparation_even_if_bad_clips_are_skipped(model, clips, bucket, capsys, monkeypatch):
    """The clips were checked in an earlier run, so they are fetched when they are encoded."""
    settings = ["--on_bad_clip", "skip"]
    prepare(model, clips, f"{bucket.url}/first", *settings, "--dry_run")
    shutil.rmtree(default_cache_folder() / "fetched")
    bucket.store.faults[".mp4"] = ["503"] * 999
    told = refusal(capsys, model, clips, f"{bucket.url}/second", *settings)
    assert re.search(r"error: .*\.mp4 cannot be fetched after 4 tries", told)
    assert "second/index" not in " ".join(bucket.listing())


def test_a_missing_shard_is_named_before_training_and_a_busy_store_during_it(model, on_disk, bucket):
    bucket.put_folder(on_disk, "prepared")
    shard = next(key for key in bucket.listing() if "/latents/" in key)
    bucket.store.faults[shard] = ["503"] * 99
    with pytest.raises(Exception, match=rf"{shard} cannot be (read|fetched) after 4 tries"):
        read_all(model, f"{bucket.url}/prepared")
    bucket.delete(shard)
    with pytest.raises(Exception, match=rf"files of {bucket.url}/prepared are missing:\n.*{shard}"):
        read_all(model, f"{bucket.url}/prepared")


@pytest.mark.parametrize(
    ("output", "flags", "told"),
    [
        ("https://host.example/out", [], "--output_dir: https://host.example/out can only be read"),
        (
            "s3://no-such-bucket/out",
            [],
            "s3://no-such-bucket/out/.writable cannot be written: there is no such bucket",
        ),
        ("s3://bucket/out", ["--layout", "files"], "--output_dir: s3://bucket/out takes only shards"),
    ],
)
def test_a_store_that_cannot_be_written_is_refused_before_models_load(
    model, demo_clips, bucket, capsys, output, flags, told
):
    assert told in refusal(capsys, model, demo_clips, output, *flags)
