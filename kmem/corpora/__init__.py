"""Where text comes from: packages that carry English text, and generators."""
