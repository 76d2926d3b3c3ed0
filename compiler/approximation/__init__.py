"""Error budgets: calibration samples, the ledger of what was spent, and the search for what to spend it on."""
