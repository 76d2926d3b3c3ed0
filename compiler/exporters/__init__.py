"""Folded models as files of other libraries."""
