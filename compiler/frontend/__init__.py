"""The way from a model to a program: torch.export, masks of pruners, ONNX."""
