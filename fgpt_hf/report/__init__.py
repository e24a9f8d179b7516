"""Reports on runs: figures, summaries, comparisons, pages."""
