"""The loss of logits, and its gradient in their place."""
