"""What runs an exported ONNX file, with ONNX Runtime, NumPy and Pillow alone: nothing here may import torch."""
