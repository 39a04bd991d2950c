"""Layers and blocks for inference: channels-last, norms folded, activations fused."""
