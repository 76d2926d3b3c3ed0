"""The part of Thresher that a compiled model needs to run: NumPy and safetensors; neither torch nor the compiler."""
