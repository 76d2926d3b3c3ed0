"""Last stage: the form that the backend runs best."""
