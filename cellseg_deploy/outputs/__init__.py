"""Result files: their content (one module per format), and writing them atomically."""
