"""The recipe of the tiny text encoder: its captions, and the saved encoder."""

import random
import shutil

import torch
from transformers import T5EncoderModel

from make_tiny_model import TEXT_DIM
from train_text_encoder import CHOICES, draw_caption, main


def test_captions_name_the_choices():
    chance = random.Random(0)
    drawn = [draw_caption(chance) for _ in range(200)]
    for caption, choices in drawn:
        shape, colour, background, motion = (names[i] for names, i in zip(CHOICES, choices, strict=True))
        assert caption.endswith(f"{colour} {shape} {motion} over a plain {background} background")
    assert 60 < sum(not caption.startswith(("a ", "an ")) for caption, _ in drawn) < 140


def test_a_trained_encoder_is_saved(tiny_models, tmp_path, monkeypatch):
    for part in ("tokenizer", "text_encoder"):
        shutil.copytree(tiny_models("5b") / part, tmp_path / part)
    monkeypatch.setattr(
        "sys.argv", ["train_text_encoder.py", "--model_dir", str(tmp_path), "--num_steps", "3", "--batch_size", "2"]
    )
    main()
    before, after = (
        T5EncoderModel.from_pretrained(folder / "text_encoder") for folder in (tiny_models("5b"), tmp_path)
    )
    tokens = torch.arange(8)[None]
    states = after(tokens).last_hidden_state
    assert states.shape == (1, 8, TEXT_DIM)
    assert not torch.equal(states, before(tokens).last_hidden_state)
