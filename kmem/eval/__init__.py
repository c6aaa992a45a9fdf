"""What judges a model: held-out loss, questions, controls, the lm-evaluation-harness adapter."""
