"""From an ONNX file to a torch module."""
