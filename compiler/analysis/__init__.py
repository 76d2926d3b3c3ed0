"""Analyses of programs: what they find out, passes act on; they change nothing."""
