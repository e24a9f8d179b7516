"""Describe a run: typed fields, named presets, flags and YAML."""
