"""The attentions of a program: where they are, of which kind, and a summary for the report."""
