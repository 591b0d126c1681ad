"""All that exists for the miniature: scenes, their sets, a judge that knows the truth, a model."""
