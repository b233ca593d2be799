"""Networks and engines by themselves."""
