"""The search for the pass or the operator that makes a result wrong."""
