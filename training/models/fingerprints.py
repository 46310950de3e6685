"""Fingerprints of a model's encoders: prepared data is valid for any model with the same ones."""

import hashlib
from pathlib import Path


ENCODERS = ("vae", "text_encoder", "tokenizer")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint_encoders(model: Path | None, variant: str | None = None) -> dict[str, str | None]:
    """Return a digest of the weights of each encoder of a model; None for an encoder without files.

    Args:
        model: its folder in the diffusers layout; None if it is not on this machine.
        variant: of the weight files, as `from_pretrained` takes it.
    """
    return {name: None if model is None else _fingerprint(model / name, variant) for name in ENCODERS}


def _fingerprint(folder: Path, variant: str | None) -> str | None:
    """Hash sizes and evenly spread pieces of the files: reading all of a text encoder would take minutes."""
    files = weight_files(folder, variant) if folder.name != "tokenizer" else sorted(folder.glob("[!.]*"))
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(size.to_bytes(8, "big"))
        with open(file, "rb") as stream:
            for number in range(_SAMPLES):
                stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:16] if files else None


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component that `from_pretrained` would read; safetensors before others."""
    for suffix in (".safetensors", ".bin"):
        found = sorted(folder.glob(f"[!.]*{suffix}"))
        # diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
        files = [file for file in found if (f".{variant}" in file.stem if variant else "." not in file.stem)]
        if files:
            return files
    return []
