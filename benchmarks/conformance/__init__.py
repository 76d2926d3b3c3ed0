"""Suites that nobody here wrote, judged sample by sample: ``make conformance`` writes ``docs/conformance.md``."""
