"""Whether two programs compute the same: comparison, rounding, certificates of folds, and their independent verifier."""
