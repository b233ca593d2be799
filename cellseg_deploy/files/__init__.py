"""The file system: whole or absent, one writer, the same bytes."""
