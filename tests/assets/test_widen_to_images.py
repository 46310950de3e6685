"""A widened model first predicts the same as the original, whatever the image."""

import torch
from diffusers import CogVideoXImageToVideoPipeline, CogVideoXTransformer3DModel

from widen_to_images import main


def test_a_widened_model_takes_images_and_first_predicts_the_same(tiny_models, tmp_path, monkeypatch):
    folder = tmp_path / "wide"
    monkeypatch.setattr(
        "sys.argv", ["widen_to_images.py", "--model_dir", str(tiny_models("2b")), "--output_dir", str(folder)]
    )
    main()
    wide = CogVideoXImageToVideoPipeline.from_pretrained(folder).transformer
    narrow = CogVideoXTransformer3DModel.from_pretrained(tiny_models("2b") / "transformer")
    assert wide.config.in_channels == 32
    generator = torch.Generator().manual_seed(0)
    latents, image = torch.randn(2, 1, 5, 16, 8, 12, generator=generator)
    texts = torch.randn(1, 226, 64, generator=generator)
    rest = {"encoder_hidden_states": texts, "timestep": torch.tensor([500]), "return_dict": False}
    with torch.inference_mode():
        expected = narrow(latents, **rest)[0]
        shown = wide(torch.cat([latents, image], dim=2), **rest)[0]
    assert torch.allclose(shown, expected, atol=1e-5)
