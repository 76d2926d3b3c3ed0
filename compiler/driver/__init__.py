"""compile(): from a model to a compiled model, stage by stage."""
