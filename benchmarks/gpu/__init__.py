"""What is asked of a GPU by ``gpu-check``: its parts, each run in a process of its own, and the report."""
