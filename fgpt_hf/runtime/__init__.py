"""Describe the hardware, start processes, and plan memory and time."""
