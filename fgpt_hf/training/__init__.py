"""Train a model, save its state and resume it exactly."""
