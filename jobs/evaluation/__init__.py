"""Evaluating a run with Ray workers."""
