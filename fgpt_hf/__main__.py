"""`python -m fgpt_hf …` is `fgpt …`, which `torchrun -m fgpt_hf …` needs."""

from fgpt_hf.cli.main import main

main()
