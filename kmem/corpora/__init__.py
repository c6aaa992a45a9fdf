"""Sources of text: packages that contain English text, and generators."""
