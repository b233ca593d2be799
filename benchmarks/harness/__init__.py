"""What all measurements share: stopwatch, workers, the machine, reports."""
