"""What a person at a terminal sees: start, end, progress and the kept log."""
