"""The mathematics: latents, timesteps, the objective, the two tasks, random draws."""
