"""What tests share: models, graphs, planted passes, and NVIDIA's compiler without a GPU."""
