"""Which modules pytest cannot import for their doctests, since an extra is not installed."""

from importlib.util import find_spec

collect_ignore = [] if find_spec("lm_eval") else ["fgpt_hf/evaluation/harness.py"]
