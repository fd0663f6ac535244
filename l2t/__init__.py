"""l2t: learning to teach with dynamic loss functions."""
