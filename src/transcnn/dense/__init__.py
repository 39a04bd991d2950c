"""Segmentation and detection networks on the maps of any backbone."""
