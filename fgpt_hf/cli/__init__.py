"""Run the commands: `fgpt …` and the three training scripts."""
