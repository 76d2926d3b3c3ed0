"""Compiled models, and the file that they are saved in."""
