"""Labels against masks."""
