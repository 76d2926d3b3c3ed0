"""How facts about slices pass through operators, one module per family; ``thresher.analysis.slices.operators`` is the table of them."""
