"""Evaluation -> report.html: one self-contained page, no network, no JavaScript.

The page serves readers with a minute (summary, warnings) and readers with an hour (audit, model
card, how to reproduce it). It has thumbnails and numbers, and nothing that identifies a patient.
"""
