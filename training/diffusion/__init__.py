"""The mathematics of training: latents, timesteps, the objective, the two tasks, random draws."""
