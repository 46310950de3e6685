import json

import pytest
import torch

from buckets import Bucket
from errors import UserError
from prepared import PreparedSettings, claim_folder, read_index, read_tensor, write_index, write_tensor


SETTINGS = PreparedSettings(model="model", dtype="fp32", max_sequence_length=226)


def write_clip(folder, name, moments, embeds):
    write_tensor(folder, "video_latents", name, moments)
    write_tensor(folder, "prompt_embeds", name, embeds)


def test_what_is_written_is_read_back(tmp_path):
    moments, embeds = torch.randn(32, 3, 8, 12), torch.randn(226, 64)
    write_clip(tmp_path, "a", moments, embeds)
    write_index(tmp_path, [("a", "two\nlines", Bucket(9, 64, 96))], with_tensors=True)
    (clip,) = read_index(tmp_path)
    assert (clip.name, clip.bucket) == ("a", Bucket(9, 64, 96))
    assert torch.equal(read_tensor(clip.video_latents), moments)
    assert torch.equal(read_tensor(clip.prompt_embeds), embeds)


def test_the_lists_have_a_line_for_each_clip_whatever_is_in_its_caption(tmp_path):
    write_index(
        tmp_path, [("a", "two\nlines", Bucket(9, 64, 96)), ("b", "one", Bucket(9, 64, 96))], with_tensors=False
    )
    assert (tmp_path / "prompts.txt").read_text() == "two lines\none\n"
    assert (tmp_path / "videos.txt").read_text() == "videos/a.mp4\nvideos/b.mp4\n"
    assert not (tmp_path / "data.jsonl").exists()


def test_a_slice_of_a_batch_is_stored_without_the_rest_of_the_batch(tmp_path):
    write_tensor(tmp_path, "video_latents", "a", torch.zeros(64, 1000)[0])
    assert (tmp_path / "video_latents" / "a.pt").stat().st_size < 10_000


def test_a_folder_of_the_original_script_is_read_through_its_index(tmp_path):
    write_clip(tmp_path, "0a1b", torch.zeros(32, 13, 60, 90), torch.zeros(226, 4096))
    entry = {
        "prompt": "prompts/0a1b.txt",
        "prompt_embed": "prompt_embeds/0a1b.pt",
        "video": "videos/0a1b.mp4",
        "video_latent": "video_latents/0a1b.pt",
        "metadata": {"num_frames": 49, "height": 480, "width": 720},
    }
    (tmp_path / "data.jsonl").write_text(json.dumps(entry) + "\n")
    assert [clip.bucket for clip in read_index(tmp_path)] == [Bucket(49, 480, 720)]


def test_without_an_index_the_tensors_tell_the_sizes(tmp_path):
    write_clip(tmp_path, "a", torch.zeros(32, 13, 60, 90), torch.zeros(226, 4096))
    write_clip(tmp_path, "b", torch.zeros(32, 3, 8, 12), torch.zeros(226, 4096))
    assert [clip.bucket for clip in read_index(tmp_path)] == [Bucket(49, 480, 720), Bucket(9, 64, 96)]


def test_a_folder_that_was_never_prepared_says_what_to_run(tmp_path):
    with pytest.raises(UserError, match=r"--load_tensors: .* holds no prepared data .* prepare_dataset\.sh"):
        read_index(tmp_path)


def test_all_missing_tensor_files_are_listed(tmp_path):
    write_index(tmp_path, [(name, "x", Bucket(9, 64, 96)) for name in ("a", "b")], with_tensors=True)
    with pytest.raises(UserError, match="4 files") as caught:
        read_index(tmp_path)
    assert all(
        f"{kind}/{name}.pt" in str(caught.value) for kind in ("video_latents", "prompt_embeds") for name in "ab"
    )


def test_a_broken_line_of_the_index_is_named(tmp_path):
    (tmp_path / "data.jsonl").write_text('{"video_latent": "video_latents/a.pt"}\n')
    with pytest.raises(UserError, match=r"data\.jsonl:1"):
        read_index(tmp_path)


def test_a_folder_keeps_to_the_settings_it_was_begun_with(tmp_path):
    claim_folder(tmp_path, SETTINGS)
    claim_folder(tmp_path, SETTINGS)
    with pytest.raises(UserError, match=r"dtype was 'fp32', is now 'bf16'"):
        claim_folder(tmp_path, PreparedSettings(model="model", dtype="bf16", max_sequence_length=226))


def test_lists_of_another_data_set_are_never_overwritten(tmp_path):
    (tmp_path / "prompts.txt").write_text("mine\n")
    with pytest.raises(UserError, match=r"already holds prompts\.txt"):
        claim_folder(tmp_path, SETTINGS)


def test_a_file_that_would_run_code_when_unpickled_is_refused(tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "a.pt").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        read_tensor(tmp_path / "a.pt")
    assert not (tmp_path / "evil").exists()


def test_a_preparation_that_was_not_finished_is_not_trained_on(tmp_path):
    claim_folder(tmp_path, SETTINGS)
    write_clip(tmp_path, "a", torch.zeros(32, 3, 8, 12), torch.zeros(226, 64))
    with pytest.raises(UserError, match="was not finished"):
        read_index(tmp_path)
