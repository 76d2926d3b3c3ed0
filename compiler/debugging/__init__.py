"""Whose fault a wrong result is."""
