"""Stage 1: one spelling for each thing."""
