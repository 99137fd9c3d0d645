"""The networks: Wan transformer with per-frame timesteps, causal video VAE, text encoder."""
