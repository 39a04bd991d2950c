"""A page in the browser on which a trained network answers about pictures and shows where it looks."""

from .command import demo

__all__ = ["demo"]
