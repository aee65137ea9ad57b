"""Evaluation -> report.html: one self-contained page, no network, no JavaScript.

The page is for a reader who has a minute (summary, warnings) as for one who has an hour (audit,
model card, how to reproduce it). It holds thumbnails and numbers, and nothing that names a patient.
"""

from pneumo.report.data import describe_duplicates
from pneumo.report.facts import DataFacts, ModelFacts, Provenance
from pneumo.report.page import MAX_PAGE_BYTES, render_report
from pneumo.report.search import render_search
from pneumo.report.summary import find_warnings, summarise

__all__ = [
    "MAX_PAGE_BYTES",
    "DataFacts",
    "ModelFacts",
    "Provenance",
    "describe_duplicates",
    "find_warnings",
    "render_report",
    "render_search",
    "summarise",
]
