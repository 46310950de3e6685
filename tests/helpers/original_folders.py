"""Prepared folders as the original preparation script wrote them, of noise."""

import json
from pathlib import Path

import torch


def write_original_folder(folder: Path, count: int, *, index: str = "full") -> Path:
    """Write samples of 17x64x96 for the tiny models, without image latents.

    Args:
        index: data.jsonl is "full", "half" or "empty", or there is "none" and no lists, as before the script's end.
    """
    torch.manual_seed(0)
    entries = []
    for number in range(count):
        stem = f"9f3c{number}"  # the script drew random names
        tensors = {"video_latents": torch.randn(32, 5, 8, 12), "prompt_embeds": torch.randn(226, 64)}
        for kind, tensor in tensors.items():
            (folder / kind).mkdir(parents=True, exist_ok=True)
            torch.save(tensor, folder / kind / f"{stem}.pt")
        files = {"video_latent": f"video_latents/{stem}.pt", "prompt_embed": f"prompt_embeds/{stem}.pt"}
        # It named these even where it did not save them.
        files |= {"image": f"images/{stem}.png", "image_latent": f"image_latents/{stem}.pt"}
        files |= {"prompt": f"prompts/{stem}.txt", "video": f"videos/{stem}.mp4"}
        entries.append(files | {"metadata": {"num_frames": 17, "height": 64, "width": 96}})
    if index != "none":
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        shown = {"full": len(lines), "half": len(lines) // 2, "empty": 0}[index]
        (folder / "data.jsonl").write_text(lines[:shown])
        (folder / "videos.txt").write_text("".join(f"{entry['video']}\n" for entry in entries))
        (folder / "prompts.txt").write_text("".join(f"clip {number}\n" for number in range(count)))
    return folder
