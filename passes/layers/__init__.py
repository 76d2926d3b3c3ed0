"""Whole layers."""
