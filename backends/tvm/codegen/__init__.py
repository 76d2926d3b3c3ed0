"""From a Relax module to compiled code."""
