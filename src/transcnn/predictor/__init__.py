"""A trained network as a program uses it: images in, typed predictions out, from a checkpoint or an ONNX file."""
