"""Measure models: benchmarks, validation loss and samples."""
