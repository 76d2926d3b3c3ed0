"""Which plan each kernel gets, and how plans are measured."""
