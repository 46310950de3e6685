"""Embed every prompt once, before the transformer is loaded, and keep the embeddings on disk.

The text encoder (4.8 B parameters) is larger than most transformers it conditions: the two are never loaded together.
Training on raw clips reads the embeddings of its captions here, validation those of its prompts.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from common.bars import tqdm
from common.files import atomic_write
from models.encoding import encode_prompts
from models.source import ModelSource


@dataclass(frozen=True)
class PromptCache:
    """Prompt embeddings in a folder, one safetensors file per distinct prompt.

    File names depend on the other fields too, so that several caches can share a folder.
    """

    folder: Path  # created when needed
    source: ModelSource
    dtype: torch.dtype  # of the text encoder and of the embeddings
    in_8bit: bool = False  # quantize the text encoder to int8, which changes the embeddings

    def load(self, prompt: str) -> torch.Tensor:
        """Return the embedding `[226, D]` of a prompt that was embedded before."""
        return load_file(self._file(prompt))["prompt_embeds"]

    def store(self, prompt: str, embeds: torch.Tensor) -> None:
        """Keep the embedding `[226, D]` of a prompt, of any dtype, for `load`."""
        with atomic_write(self._file(prompt)) as path:
            save_file({"prompt_embeds": embeds.cpu().contiguous()}, path)

    def embed(self, prompts: list[str], device: torch.device, *, rank: int = 0, world_size: int = 1) -> None:
        """Embed this rank's share of the missing prompts; loads the text encoder only if there are any.

        Callers on several ranks wait for one another before they `load`.
        """
        # Divided before looking for files, which other ranks write meanwhile.
        share = list(dict.fromkeys(prompts))[rank::world_size]
        share = [prompt for prompt in share if not self._file(prompt).exists()]
        if not share:
            return
        pipeline = self.source.load_text_pipeline(self.dtype, device=device, in_8bit=self.in_8bit)
        for prompt in tqdm(share, desc="Embedding prompts", unit=" prompts", disable=rank != 0):
            self.store(prompt, encode_prompts(pipeline, [prompt])[0])

    def _file(self, prompt: str) -> Path:
        precision = f"{self.dtype}, int8 weights" if self.in_8bit else str(self.dtype)
        key = repr((self.source.fingerprint(), precision, prompt))
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
