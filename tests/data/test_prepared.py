"""Prepared folders are claimed, written and read as `data.prepared` documents."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save, save_file

from common.errors import UserError
from common.text_files import index_lines
from data.buckets import Bucket
from data.prepared import (
    PreparedSettings,
    StoredTensor,
    check_encoders,
    claim_folder,
    read_empty_prompt,
    read_index,
    read_prepared_settings,
    read_tensor,
    sample_in_files,
    sample_in_shards,
    write_empty_prompt,
    write_settings,
)
from original_folders import write_original_folder


ENCODERS = {"vae": "a", "text_encoder": "b", "tokenizer": "c"}
BUCKET = Bucket(9, 64, 96)
TENSORS = {"video_latents": torch.zeros(32, 3, 8, 12), "prompt_embeds": torch.zeros(226, 64)}
TENSORS["image_latents"] = torch.ones(32, 1, 8, 12)


def settings(**changes):
    usual = {"layout": "shards", "encoders": ENCODERS, "dtype": "fp32", "max_sequence_length": 226, "tiling": False}
    return PreparedSettings(**usual | changes)


def write_clip(folder, name, *kinds):
    """Write a clip of `BUCKET` as the original script does, and return its index entry."""
    for kind in ("video_latents", "prompt_embeds", *kinds):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        torch.save(TENSORS[kind], folder / kind / f"{name}.pt")
    return sample_in_files(name, BUCKET, with_images=bool(kinds))


def write_shards(folder, names, *, with_images=False):
    """Write samples in two shards with one caption, and their index."""
    for part in ("latents", "prompt_embeds"):
        (folder / part).mkdir(parents=True)
    latents, embeds = folder / "latents" / "aa.safetensors", folder / "prompt_embeds" / "bb.safetensors"
    kinds = {"video_latents": (32, 3, 8, 12)} | ({"image_latents": (2, 32, 1, 8, 12)} if with_images else {})
    tensors = {f"{name}.{kind}": torch.randn(shape) for name in names for kind, shape in kinds.items()}
    save_file(tensors, latents)
    save_file({"caption.prompt_embeds": torch.randn(226, 64)}, embeds)
    others = (latents, embeds, "caption", BUCKET)
    entries = [sample_in_shards(folder, name, *others, with_images=with_images) for name in names]
    (folder / "index.jsonl").write_text(index_lines(entry | {"repeats": 1.5} for entry in entries))
    return tensors


@pytest.mark.parametrize("with_images", [False, True])
def test_samples_in_shards_are_read_back(tmp_path, with_images):
    tensors = write_shards(tmp_path, ["a", "b.c"], with_images=with_images)
    clips = read_index(tmp_path)
    assert [(clip.name, clip.bucket, clip.repeats) for clip in clips] == [("a", BUCKET, 1.5), ("b.c", BUCKET, 1.5)]
    assert torch.equal(read_tensor(clips[1].video_latents), tensors["b.c.video_latents"])
    assert read_tensor(clips[1].prompt_embeds).shape == (226, 64)
    assert (clips[1].image_latents is not None) == with_images
    if with_images:
        assert torch.equal(read_tensor(clips[1].image_latents), tensors["b.c.image_latents"])


def test_all_missing_tensors_are_listed(tmp_path):
    write_shards(tmp_path, ["a", "b"])
    save_file({"a.video_latents": torch.zeros(1)}, tmp_path / "latents" / "aa.safetensors")
    with pytest.raises(UserError, match=r"1 files of .* are missing:\n.*aa\.safetensors \(b\.video_latents\)"):
        read_index(tmp_path)
    (tmp_path / "index.jsonl").unlink()
    (tmp_path / "data.jsonl").write_text(index_lines(sample_in_files(n, BUCKET, with_images=False) for n in "ab"))
    with pytest.raises(UserError, match="4 files") as caught:
        read_index(tmp_path)
    kinds = ("video_latents", "prompt_embeds")
    assert all(f"{kind}/{name}.pt" in str(caught.value) for kind in kinds for name in "ab")


def test_a_folder_that_was_never_prepared_or_not_finished_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"--load_tensors: .* has no prepared data .* prepare_dataset\.sh"):
        read_index(tmp_path)
    claim_folder(tmp_path, settings())
    write_clip(tmp_path, "a")
    with pytest.raises(UserError, match=r"was not finished .* run it again"):
        read_index(tmp_path)


@pytest.mark.parametrize("kinds", [[], ["image_latents"]])
def test_a_folder_of_the_original_script_is_read_with_and_without_its_index(tmp_path, kinds):
    entry = write_clip(tmp_path, "0a1b", *kinds)
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    (clip,) = read_index(tmp_path)
    assert clip.bucket == BUCKET
    assert (clip.image_latents is not None) == bool(kinds)
    if kinds:
        assert read_tensor(clip.image_latents).sum() == 32 * 8 * 12
    (tmp_path / "data.jsonl").unlink()
    assert read_index(tmp_path) == [clip]  # the sizes come from the tensors


@pytest.mark.parametrize("index", ["full", "half", "empty", "none"])
def test_all_samples_of_an_original_folder_are_read_whatever_its_script_wrote_last(tmp_path, caplog, index):
    """It named image latents that it never saved, and its data.jsonl may be incomplete."""
    clips = read_index(write_original_folder(tmp_path, 4, index=index))
    assert [clip.name for clip in clips] == [f"9f3c{number}" for number in range(4)]
    assert {clip.bucket for clip in clips} == {Bucket(17, 64, 96)}
    assert all(clip.image_latents is None for clip in clips)
    missing = {"half": ["lacks 2 of the 4 samples"], "empty": ["lacks 4 of the 4 samples"]}.get(index, [])
    assert [part in record.message for part, record in zip(missing, caplog.records, strict=True)] == [True] * len(
        missing
    )


def test_an_original_folder_has_the_samples_of_its_list_as_in_the_original_training(tmp_path):
    folder = write_original_folder(tmp_path, 4)
    (folder / "videos.txt").write_text("videos/9f3c2.mp4\nvideos/9f3c0.mp4\n")
    assert [clip.name for clip in read_index(folder)] == ["9f3c2", "9f3c0"]
    (folder / "videos.txt").write_text("videos/9f3c2.mp4\nvideos/gone.mp4\n")
    with pytest.raises(UserError, match=r"1 files of .* are missing:\n.*video_latents/gone\.pt"):
        read_index(folder)


def test_an_index_of_an_original_folder_that_leads_outside_is_refused(tmp_path):
    folder = write_original_folder(tmp_path / "prepared", 1)
    entry = json.loads((folder / "data.jsonl").read_text()) | {"prompt_embed": "../secret.pt"}
    (folder / "data.jsonl").write_text(json.dumps(entry))
    with pytest.raises(UserError, match=r"data\.jsonl names 1 files outside of its folder"):
        read_index(folder)


def test_an_index_that_leads_out_of_its_folder_is_refused_with_its_lines(tmp_path):
    """A folder from a stranger reads only its own files."""
    folder = tmp_path / "prepared"
    claim_folder(folder, settings())
    good = write_clip(folder, "a")
    write_clip(tmp_path, "secret")
    bad = [{"video_latent": "../video_latents/secret.pt"}, {"prompt_embed": f"{tmp_path}/prompt_embeds/secret.pt"}]
    (folder / "data.jsonl").write_text(index_lines([good, *(good | outside for outside in bad)]))
    with pytest.raises(UserError, match=r"data\.jsonl names 2 files outside of its folder; .*") as caught:
        read_index(folder)
    _, first, second = str(caught.value).splitlines()
    assert first.strip() == "data.jsonl:2: ../video_latents/secret.pt"
    assert second.strip() == f"data.jsonl:3: {tmp_path}/prompt_embeds/secret.pt"
    assert len(read_index(folder, allow_outside_paths=True)) == 3


WITHOUT_REPEATS = json.dumps(sample_in_files("a", BUCKET, with_images=False) | {"repeats": 0})
WITHOUT_HEIGHT = json.dumps(sample_in_files("a", Bucket(9, 0, 96), with_images=False))


@pytest.mark.parametrize("line", ['{"name": "\udcff"}', "[]", '{"name": 5}', WITHOUT_REPEATS, WITHOUT_HEIGHT])
@pytest.mark.parametrize("name", ["index.jsonl", "data.jsonl"])
def test_a_damaged_line_of_an_index_is_named(tmp_path, name, line):
    claim_folder(tmp_path, settings())
    (tmp_path / name).write_text(f"\n{line}\n", encoding="utf-8", errors="surrogateescape")
    with pytest.raises(UserError, match=rf"{name}:2: not a prepared clip"):
        read_index(tmp_path)


def test_a_folder_keeps_the_settings_of_its_first_preparation(tmp_path):
    claim_folder(tmp_path, settings())
    claimed = claim_folder(tmp_path, settings(flags={"fps": 8}, model="elsewhere"))
    assert read_prepared_settings(tmp_path)["flags"] == {}  # those of the existing index
    write_settings(tmp_path, claimed)
    assert read_prepared_settings(tmp_path)["flags"] == {"fps": 8}
    with pytest.raises(UserError, match=r"dtype was 'fp32', is now 'bf16'"):
        claim_folder(tmp_path, settings(dtype="bf16"))
    with pytest.raises(UserError, match=r"another vae; tiling was False, is now True"):
        claim_folder(tmp_path, settings(encoders=ENCODERS | {"vae": "d"}, tiling=True))


def test_an_encoder_without_files_does_not_differ_and_is_remembered(tmp_path):
    claim_folder(tmp_path, settings())
    claim_folder(tmp_path, settings(encoders=ENCODERS | {"vae": None}))
    assert read_prepared_settings(tmp_path)["encoders"] == ENCODERS


def test_other_encoders_than_the_models_are_named(tmp_path):
    assert check_encoders(tmp_path, ENCODERS) == ""  # a folder of the original script, without settings
    claim_folder(tmp_path, settings(model="THUDM/CogVideoX-2b"))
    assert check_encoders(tmp_path, ENCODERS) == ""
    assert check_encoders(tmp_path, ENCODERS | {"tokenizer": None}) == ""
    problem = check_encoders(tmp_path, {"vae": "x", "text_encoder": "y", "tokenizer": "c"})
    assert "another vae and text_encoder (of THUDM/CogVideoX-2b) than the model's" in problem


def test_lists_of_another_data_set_are_never_overwritten(tmp_path):
    (tmp_path / "prompts.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"already has prompts\.txt"):
        claim_folder(tmp_path, settings())


def test_a_file_that_would_run_code_when_unpickled_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        read_tensor(StoredTensor(tmp_path / "a.pt"))
    assert not (tmp_path / "evil").exists()


@pytest.mark.parametrize("content", ["[]", "null", '{"encoders": null}', "{"])
def test_damaged_settings_are_named(tmp_path, content):
    (tmp_path / "prepared.json").write_text(content)
    with pytest.raises(UserError, match=r"prepared\.json is damaged"):
        read_prepared_settings(tmp_path)


def test_without_an_index_a_damaged_tensor_is_named(tmp_path):
    (tmp_path / "video_latents").mkdir()
    torch.save(torch.zeros(3), tmp_path / "video_latents" / "a.pt")
    with pytest.raises(UserError, match=r"a\.pt has no latents of a video"):
        read_index(tmp_path)


def test_the_empty_prompt_is_read_back_if_it_exists(tmp_path):
    assert read_empty_prompt(tmp_path) is None
    embeds = torch.randn(2, 226, 64, dtype=torch.bfloat16)
    write_empty_prompt(tmp_path, embeds[1])
    assert torch.equal(read_empty_prompt(tmp_path), embeds[1])
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["empty_prompt.safetensors"]


@pytest.mark.parametrize(("name", "shape", "cut"), [("", (226, 64), 4), ("other_", (226, 64), 0), ("", (64,), 0)])
def test_an_empty_prompt_that_cannot_be_used_is_named(tmp_path, name, shape, cut):
    content = save({f"{name}prompt_embeds": torch.zeros(shape)})
    (tmp_path / "empty_prompt.safetensors").write_bytes(content[: len(content) - cut])
    with pytest.raises(UserError, match=r"empty_prompt\.safetensors .*; remove it and prepare the data again"):
        read_empty_prompt(tmp_path)
