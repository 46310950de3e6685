"""Fingerprints of a model's encoders: prepared data is valid for any model with the same ones."""

import hashlib
from pathlib import Path


ENCODERS = ("vae", "text_encoder", "tokenizer")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


def fingerprint_encoders(model: Path | None, variant: str | None = None) -> dict[str, str | None]:
    """Return a digest of the weights of each encoder of a model.

    Args:
        model: its folder in the diffusers layout; None if it is not on this machine.
        variant: of the weight files, as `from_pretrained` takes it.

    Returns:
        encoder -> digest; None for an encoder without files, as in a folder with only the transformer.
    """
    return {name: None if model is None else _fingerprint(model / name, variant) for name in ENCODERS}


def _fingerprint(folder: Path, variant: str | None) -> str | None:
    files = weight_files(folder, variant) if folder.name != "tokenizer" else sorted(folder.glob("[!.]*"))
    if not files:
        return None
    digest = hashlib.sha256()
    for file in files:
        _add_samples(file, digest)
    return digest.hexdigest()[:16]


def weight_files(folder: Path, variant: str | None) -> list[Path]:
    """Return the weight files of a component that `from_pretrained` would read; safetensors before others."""
    for suffix in (".safetensors", ".bin"):
        files = [
            path
            for path in sorted(folder.glob(f"[!.]*{suffix}"))
            # diffusion_pytorch_model.fp16.safetensors, model.fp16-00001-of-00002.safetensors
            if (f".{variant}" in path.stem if variant else "." not in path.stem)
        ]
        if files:
            return files
    return []


def _add_samples(file: Path, digest: "hashlib._Hash") -> None:
    """Add size and evenly spread pieces of a file: reading all of a text encoder would take minutes."""
    size = file.stat().st_size
    digest.update(size.to_bytes(8, "big"))
    with open(file, "rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, size - _SAMPLE_BYTES) * number // (_SAMPLES - 1))
            digest.update(stream.read(_SAMPLE_BYTES))
