"""Publish models, model cards and Spaces on the Hub."""
