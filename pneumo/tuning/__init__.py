"""Hyperparameter search: the objective of a trial, and which trial's settings are chosen."""
