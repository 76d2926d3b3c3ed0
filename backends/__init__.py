"""What runs a program: TVM (CPU, CUDA) and eager torch (the reference)."""
