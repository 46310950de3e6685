import shutil
from pathlib import Path

import pytest

from models.fingerprints import ENCODERS, fingerprint_encoders


@pytest.fixture
def model(tiny_models, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_models("5b"), tmp_path / "model"))


def test_the_same_weights_have_the_same_fingerprints_in_any_folder(model, tiny_models):
    found = fingerprint_encoders(model)
    assert found == fingerprint_encoders(tiny_models("5b"))
    assert found.keys() == set(ENCODERS)
    assert len(set(found.values())) == 3


FILES = ["vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("where", [0, -1])
def test_a_changed_file_changes_only_the_fingerprint_of_its_encoder(model, file, where):
    before = fingerprint_encoders(model)
    content = bytearray((model / file).read_bytes())
    content[where] ^= 1
    (model / file).write_bytes(content)
    after = fingerprint_encoders(model)
    assert {name for name in ENCODERS if before[name] != after[name]} == {file.split("/")[0]}


def test_the_transformer_does_not_matter_and_a_missing_encoder_has_no_fingerprint(model):
    before = fingerprint_encoders(model)
    shutil.rmtree(model / "transformer")
    assert fingerprint_encoders(model) == before
    shutil.rmtree(model / "vae")
    assert fingerprint_encoders(model) == before | {"vae": None}
    assert set(fingerprint_encoders(None).values()) == {None}


def test_a_variant_has_another_fingerprint(model):
    plain = model / "vae" / "diffusion_pytorch_model.safetensors"
    (model / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(plain.read_bytes()[:-2])
    before = fingerprint_encoders(model)["vae"]
    assert fingerprint_encoders(model, "fp16")["vae"] not in (before, None)
    plain.unlink()
    assert fingerprint_encoders(model)["vae"] is None
