"""Facts about slices of values: what is known, what is read, and which indices must go together."""
