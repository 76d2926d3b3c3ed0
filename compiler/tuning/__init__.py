"""Timing, the records of what was measured, and the options of a measurement."""
