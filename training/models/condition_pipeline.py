"""A pipeline that samples videos from their first and last frame, or from their beginning."""

import torch
from diffusers import CogVideoXImageToVideoPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution


class ConditionFramesPipeline(CogVideoXImageToVideoPipeline):
    """Takes as `image` the first frame, or a list: the first and the last frame, or the first 4K-3 frames."""

    def prepare_latents(
        self, image, batch_size, num_channels_latents, num_frames, height, width, dtype, device, generator, latents
    ):
        rest = num_channels_latents, num_frames, height, width, dtype, device, generator, latents
        if len(image) == batch_size:  # first frames
            return super().prepare_latents(image, batch_size, *rest)
        if batch_size != 1:
            raise ValueError("several frames can be given for only one prompt at a time")
        # The ends of a video are images, more frames are a video.
        clips = [frames.transpose(0, 1)[None] for frames in (image.split(1) if len(image) == 2 else [image])]
        moments = torch.cat([self.vae.encode(clip).latent_dist.parameters for clip in clips], dim=2)
        given = DiagonalGaussianDistribution(moments).sample(generator).permute(0, 2, 1, 3, 4).to(dtype)
        scale = self.vae_scaling_factor_image
        given = given / scale if self.vae.config.invert_scale_latents else given * scale
        latents, condition = super().prepare_latents(image[:1], batch_size, *rest)
        if len(image) == 2:
            condition[:, 0], condition[:, -1] = given[:, 0], given[:, 1]
            return latents, condition
        # CogVideoX 1.5 takes 8k or 8k + 1 frames; only the latter get a latent frame in front, and are 8k + 5 here.
        if self.transformer.config.patch_size_t and num_frames % 4 == 1:
            given = torch.cat([given[:, :1], given], dim=1)
        condition[:, : given.shape[1]] = given
        return latents, condition
