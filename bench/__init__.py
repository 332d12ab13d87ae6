"""Measurements: what a message costs, by CPU and by the clock. Never run as tests, and no test depends on a figure.

`idemq bench` starts a broker of its own on a temporary directory, so it runs anywhere, the container included. Each
figure is taken in several rounds and shown as median (min to max): machines are shared and noisy, so compare ratios
that were taken side by side in one run, and CPU per message rather than messages a second.
"""

from .command import main

__all__ = ["main"]
