"""Result files: what is in them (one module a kind), and how they come onto the disk whole."""
