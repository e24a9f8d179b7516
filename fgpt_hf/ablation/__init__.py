"""Comparisons of settings, each at its best learning rate and with its spread over seeds."""
