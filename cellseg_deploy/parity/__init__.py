"""Two forms of one network, compared."""
