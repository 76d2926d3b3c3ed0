"""From a folded model to the files of other libraries."""
