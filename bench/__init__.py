"""Measurements: what a message costs, by CPU and by the clock. Never run as tests."""
