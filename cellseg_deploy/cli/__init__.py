"""The commands: map arguments to functions, and errors to messages and exit codes. Nothing else."""
