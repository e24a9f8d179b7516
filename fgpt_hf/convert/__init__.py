"""Convert models of other projects to FGPT, and FGPT models to other formats."""
