"""What is raised for an image that can't be read."""

from __future__ import annotations

__all__ = ["BrokenImage", "NoPhotograph"]


class BrokenImage(ValueError):
    """An image that can't be read; the message is the reason, without the file's name."""


class NoPhotograph(BrokenImage):
    """An image that none of Pillow's modes holds, where nobody asked for its ``channels``."""

    def __init__(self, channels: int, dtype: str) -> None:
        super().__init__(
            f"{channels} channel{'s' * (channels != 1)} of {dtype}, which is no photograph: "
            f"--in_chans {channels} learns from such images"
        )
        self.channels = channels
