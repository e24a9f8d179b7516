"""Compute training losses without ever holding all logits."""
