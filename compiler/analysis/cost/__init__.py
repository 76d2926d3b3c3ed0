"""What a program costs: operations, bytes, an estimate of its time, and from which density on skipping zeros pays."""
