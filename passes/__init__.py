"""The passes: one idea per file, in folders named after the stages."""
