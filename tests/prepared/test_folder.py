"""Prepared folders are claimed, written and read as `prepared.folder` documents."""

import os
import pickle

import pyarrow as pa
import pytest
import torch
from safetensors.torch import save

from common.errors import UserError
from prepared.folder import (
    PreparedSettings,
    StoredTensor,
    check_encoders,
    claim_folder,
    read_empty_prompt,
    read_prepared_settings,
    read_tensor,
    sample_digest,
    sample_digests,
    write_empty_prompt,
    write_settings,
)


ENCODERS = {"vae": "a", "text_encoder": "b", "tokenizer": "c"}


def settings(**changes):
    usual = {"layout": "shards", "encoders": ENCODERS, "dtype": "fp32", "max_sequence_length": 226, "tiling": False}
    return PreparedSettings(**usual | changes)


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


def test_the_digest_that_ends_a_name_is_found_whatever_is_before_it():
    one, other = sample_digest(["a", 1]), sample_digest(["a", 2])
    names = [f"a-b-{one}", f"-{other}", one, f"a-{one}-", f"é-{other}", f"a-{one}0", "a-0123456789abcdeF"]
    assert sample_digests(pa.array(names, pa.large_string())).to_pylist() == [
        one,
        other,
        None,
        None,
        other,
        None,
        None,
    ]
