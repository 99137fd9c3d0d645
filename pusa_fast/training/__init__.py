"""Training, on the same model, ops and weights that inference uses."""
