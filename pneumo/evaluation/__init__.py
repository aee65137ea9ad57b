"""Predictions -> metrics with intervals; pure arrays in, values out."""
