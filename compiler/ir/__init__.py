"""The graph IR: programs of ATen and ``thresher::`` calls, their text form, how they run, and the way back to the model's parameters."""
