"""File system helpers: files whole or absent, one writer, the same bytes."""
