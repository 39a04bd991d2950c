"""Networks side by side: parameters, multiply-adds, speed in several engines, memory; a table and a plot."""

from .command import PAPER, compare

__all__ = ["PAPER", "compare"]
