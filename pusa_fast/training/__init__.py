"""Training on the same model, ops and weights that inference uses, and the procedural data it can learn from."""
