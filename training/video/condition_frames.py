"""Which frames of a video are given to an image-to-video model: the values of --condition_frames; opens no file.

| value | frames of the video | latent frames that they fill |
|---|---|---|
| first | the first one | the first one |
| first,last | the first and the last one, each encoded as an image | the first and the last one |
| first:K | the first 1 + 4 (K - 1), encoded together as a video | the first K |
"""

import re


FIRST, ENDS = "first", "first,last"


def parse_condition_frames(text: str) -> str:
    """Return a value of --condition_frames without spaces; raise a ValueError for another text."""
    value = text.replace(" ", "").lower()
    if value in (FIRST, ENDS) or ((match := re.fullmatch(r"first:(\d{1,4})", value)) and int(match[1]) > 1):
        return value
    raise ValueError(f"'{text}' is not one of {FIRST}, {ENDS} and first:K, such as first:3 (K of 2 or more)")


def split_files(condition: str, text: str) -> list[str]:
    """Return the files of a video to sample, which for both of its ends are two with a comma between them."""
    return [part.strip() for part in text.split(",")] if condition == ENDS else [text]


def num_condition_latents(condition: str) -> int:
    """Return the number of latent frames that the given frames fill."""
    return {FIRST: 1, ENDS: 2}.get(condition) or int(condition.partition(":")[2])


def is_context(condition: str) -> bool:
    """Return whether the given frames are the beginning of a video."""
    return condition not in (FIRST, ENDS)


def given_frames(condition: str, num_frames: int) -> list[int]:
    """Return the indices of the given frames in a video."""
    if condition == ENDS:
        return [0, num_frames - 1]
    return list(range(4 * num_condition_latents(condition) - 3))


def fewest_frames(condition: str) -> int:
    """Return the fewest frames of a video of which a latent frame is left to sample; 5 for both of its ends."""
    return {FIRST: 1, ENDS: 5}.get(condition) or 4 * num_condition_latents(condition) + 1
