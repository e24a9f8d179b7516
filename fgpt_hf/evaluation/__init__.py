"""Evaluate any causal language model of transformers on benchmarks, and a run's own model while it trains."""
