"""Evaluation of models: held-out loss, questions, controls, the lm-evaluation-harness adapter."""
