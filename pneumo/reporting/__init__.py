"""Evaluation -> figures, report.html, W&B."""
