"""Train the tiny model's text encoder to encode the caption's content at every position.

    python assets/scripts/train_text_encoder.py --model_dir base/model

trains the encoder in the folder and saves it there. T5 learns by filling in missing words of long texts; in these
captions, a missing colour cannot be guessed. So every position predicts the caption's shape, colour, background and
motion, and its own word. Padding does too, because CogVideoX attends to it.
"""

import argparse
import random
import string
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import AutoTokenizer, T5EncoderModel

from make_tiny_model import TEXT_DIM, TEXT_LENGTH, TOKENIZER_TEXT
from shapes import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, Scene


CHOICES = (tuple(SHAPES), tuple(COLOURS), tuple(BACKGROUNDS), tuple(MOTIONS))
WORDS = TOKENIZER_TEXT.split()
# Lengths to pad to, in turn: training is five times faster than with full padding.
LENGTHS = (64, 64, 64, TEXT_LENGTH)


def draw_caption(chance: random.Random) -> tuple[str, list[int]]:
    """Return a caption, in half of the cases with other words before it, and the number of each choice in it."""
    choices = [chance.randrange(len(names)) for names in CHOICES]
    caption = Scene(*(names[i] for names, i in zip(CHOICES, choices, strict=True)), 0, 0, 0, 0).caption
    before = [draw_word(chance) for _ in range(chance.randrange(1, 6))] if chance.random() < 0.5 else []
    return " ".join([*before, caption]), choices


def draw_word(chance: random.Random) -> str:
    """Return a word, or an invented one like the names of styles."""
    if chance.random() < 0.5:
        return chance.choice(WORDS)
    return "".join(chance.choices(string.ascii_letters + string.digits + "_-", k=chance.randrange(2, 9)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", type=Path, required=True, help="a folder of make_tiny_model.py")
    parser.add_argument("--num_steps", type=int, default=4000)
    parser.add_argument("--batch_size", type=int, default=16)
    args = parser.parse_args()

    torch.manual_seed(0)
    chance = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(args.model_dir / "tokenizer")
    encoder = T5EncoderModel.from_pretrained(args.model_dir / "text_encoder").train()
    heads = torch.nn.ModuleList(torch.nn.Linear(TEXT_DIM, count) for count in (*map(len, CHOICES), len(tokenizer)))
    optimizer = torch.optim.AdamW([*encoder.parameters(), *heads.parameters()], lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=args.num_steps)
    bar = tqdm(range(args.num_steps), desc="text encoder")
    for step in bar:
        captions, choices = zip(*(draw_caption(chance) for _ in range(args.batch_size)), strict=True)
        length = LENGTHS[step % len(LENGTHS)]
        padded = tokenizer(
            list(captions), padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        tokens = padded.input_ids
        states = encoder(tokens).last_hidden_state
        asked = [torch.tensor(column)[:, None].expand_as(tokens) for column in zip(*choices, strict=True)]
        told = [head(states) for head in heads]
        loss = sum(
            cross_entropy(answer.flatten(0, 1), right.flatten())
            for answer, right in zip(told, [*asked, tokens], strict=True)
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        shares = [
            (answer.argmax(-1) == right).float().mean() for answer, right in zip(told, [*asked, tokens], strict=True)
        ]
        bar.set_postfix_str(f"loss={loss.item():.3f}, right: " + " ".join(f"{share:.0%}" for share in shares))
    encoder.eval().save_pretrained(args.model_dir / "text_encoder")


if __name__ == "__main__":
    main()
