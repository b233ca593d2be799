"""The commands: words to functions, errors to messages and exit codes. Nothing else."""
