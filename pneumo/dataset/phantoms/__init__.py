"""Phantom chest X-rays in Kaggle's layout, drawn from a seed."""
