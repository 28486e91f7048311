"""To look at the model from outside, at every step from pixels to words. Nothing in the model's own files knows of it."""
