"""Captions from a vision-language model that transformers loads into this process."""

from collections.abc import Sequence

import torch
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText, AutoProcessor

from captions.text import clean_caption
from common.errors import UserError, one_line
from common.failures import exhausted_memory


class ModelCaptioner:
    """A model from a folder or the hub, on the available GPUs, in the precision that it is stored in.

    No code that comes with it is run.
    """

    def __init__(self, model: str, *, temperature: float, max_tokens: int):
        self.model = model
        try:
            # By default transformers asks the user whether to run a model's own code.
            self._processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
            self._model = AutoModelForImageTextToText.from_pretrained(
                model, dtype="auto", device_map="auto", trust_remote_code=False
            ).eval()
        # ImportError: some processors need more packages.
        except (OSError, ValueError, ImportError, SafetensorError) as error:
            reason = one_line(str(error).strip().split("\n")[0], 300)
            raise UserError(
                f"--model {model} cannot be loaded as a vision-language model: {reason}; for a model behind a server "
                "pass --endpoint too"
            ) from error
        if getattr(self._processor, "chat_template", None) is None:
            raise UserError(f"--model {model} has no chat template; use one that was trained to follow instructions")
        # transformers warns of sampling parameters when it does not sample.
        sampling = {"temperature": temperature} if temperature else dict.fromkeys(("temperature", "top_p", "top_k"))
        self._options = {"max_new_tokens": max_tokens, "do_sample": temperature > 0, **sampling}

    @torch.inference_mode()
    def describe(self, frames: Sequence[Image.Image], prompt: str) -> str:
        """Ask for a caption, as `Captioner.describe` says; UserError is raised when memory runs out."""
        content = [{"type": "image", "image": frame} for frame in frames]
        content.append({"type": "text", "text": prompt})
        try:
            inputs = self._processor.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
            ).to(self._model.device, self._model.dtype)
            sequence = self._model.generate(**inputs, **self._options)[0]
        except (RuntimeError, MemoryError) as error:
            if exhausted_memory(error) is None:
                raise
            raise UserError(
                "memory ran out; lower --num_frames or --max_size, or use a smaller --model; finished ones are kept"
            ) from error
        answer = sequence[inputs["input_ids"].shape[1] :]
        ends = self._model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        was_cut = len(answer) >= self._options["max_new_tokens"] and int(answer[-1]) not in ends
        return clean_caption(self._processor.decode(answer, skip_special_tokens=True), was_cut=was_cut)
