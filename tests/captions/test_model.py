"""Captions of a model in this process equal those of transformers, and unusable models are one line."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration

import caption_dataset
from captions.model import ModelCaptioner
from captions.text import NoCaption
from common.errors import UserError
from encoded_clips import all_frames, encode
from tiny_vision_model import LEAST_WORDS, make_tiny_vision_model


PROMPT = "a red circle moves"
COLOURS = [(255, 0, 0), (0, 0, 255), (90, 200, 30), (0, 0, 0)]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_vision_model(tmp_path_factory.mktemp("vision"))


def load(model: Path, *, temperature: float = 0.0, max_tokens: int = 8) -> ModelCaptioner:
    return ModelCaptioner(str(model), temperature=temperature, max_tokens=max_tokens)


def frames_of(colour: tuple[int, int, int], count: int = 3) -> list[Image.Image]:
    return [Image.fromarray(np.full((48, 80, 3), colour, np.uint8))] * count


def said_by_library(model: Path, frames: list[Image.Image], prompt: str, max_tokens: int = 8) -> str:
    """Decode greedily, token by token, without `generate`."""
    processor = AutoProcessor.from_pretrained(model)
    network = AutoModelForImageTextToText.from_pretrained(model)
    inputs = processor(text="<image> " * len(frames) + prompt, images=frames, return_tensors="pt")
    ids, said = inputs["input_ids"], []
    end = processor.tokenizer.eos_token_id
    while len(said) < max_tokens - 1 and end not in said:
        with torch.no_grad():
            logits = network(input_ids=ids, pixel_values=inputs["pixel_values"]).logits[0, -1]
        logits[network.generation_config.suppress_tokens] = -torch.inf
        logits[end] = logits[end] if len(said) >= LEAST_WORDS else -torch.inf
        said.append(int(logits.argmax()))
        ids = torch.cat([ids, torch.tensor([[said[-1]]])], dim=1)
    return processor.decode(said, skip_special_tokens=True)


def test_the_caption_is_the_likeliest_one_for_these_frames(model):
    captioner = load(model)
    captions = [captioner.describe(frames_of(colour), PROMPT) for colour in COLOURS]
    assert captions == [said_by_library(model, frames_of(colour), PROMPT) for colour in COLOURS]
    assert len(set(captions)) > 1


def test_clips_are_captioned_without_a_server(model, tmp_path):
    encode(tmp_path / "run.mp4", frames=12, height=96, width=160)
    flags = ["--max_tokens", "8", "--num_frames", "2", "--max_size", "80", "--prompt", PROMPT]
    caption_dataset.main(["--data_root", str(tmp_path), "--model", str(model), *flags])
    frames = [Image.fromarray(pixels) for pixels in all_frames(tmp_path / "run.mp4")[[0, 11]]]
    for frame in frames:
        frame.thumbnail((80, 80), Image.Resampling.LANCZOS)
    (row,) = [json.loads(line) for line in (tmp_path / "captions.jsonl").read_text().splitlines()]
    expected = said_by_library(model, frames, PROMPT)
    assert row == {"video": "run.mp4", "caption": expected, "captioned_by": str(model)}


def test_with_a_temperature_captions_vary(model):
    torch.manual_seed(0)
    captioner = load(model, temperature=5.0)
    assert len({captioner.describe(frames_of(COLOURS[0]), PROMPT) for _ in range(4)}) > 1


def test_an_answer_at_the_token_limit_is_cut(tmp_path):
    endless = make_tiny_vision_model(tmp_path, says_only="sea", ends=False)
    with pytest.raises(NoCaption, match="no complete sentence in it; raise --max_tokens"):
        load(endless).describe(frames_of(COLOURS[0]), PROMPT)
    in_time = make_tiny_vision_model(tmp_path, says_only="sea")
    assert set(load(in_time).describe(frames_of(COLOURS[0]), PROMPT).split()) == {"sea"}


def test_out_of_memory_is_one_line(model, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    captioner = load(model)
    monkeypatch.setattr(LlavaForConditionalGeneration, "generate", full)
    with pytest.raises(UserError, match=r"memory ran out; lower --num_frames or --max_size"):
        captioner.describe(frames_of(COLOURS[0]), PROMPT)


def test_the_code_of_a_model_is_not_run(tmp_path, monkeypatch):
    folder = make_tiny_vision_model(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "evil",
        "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForImageTextToText": "evil.Evil"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))  # answers yes to any question
    with pytest.raises(UserError, match="cannot be loaded as a vision-language model: "):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_an_unusable_model_is_one_line(tmp_path):
    (tmp_path / "text only").mkdir()
    (tmp_path / "text only" / "config.json").write_text(json.dumps({"model_type": "t5"}))
    weights = make_tiny_vision_model(tmp_path / "damaged") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    make_tiny_vision_model(tmp_path / "silent", chat_template=None)
    cannot = "cannot be loaded as a vision-language model: "
    reasons = {"nowhere": cannot, "text only": cannot, "damaged": cannot, "silent": "has no chat template"}
    for name, reason in reasons.items():
        with pytest.raises(UserError) as error:
            load(tmp_path / name)
        assert str(error.value).startswith(f"--model {tmp_path / name} {reason}")
        assert "\n" not in str(error.value)
