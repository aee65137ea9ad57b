"""Evaluation -> report.html: one self-contained page, no network, no JavaScript.

The page is for a reader who has a minute (summary, warnings) as for one who has an hour (audit,
model card, how to reproduce it). It holds thumbnails and numbers, and nothing that names a patient.
"""

from pneumo.reporting.page.data_section import describe_duplicates
from pneumo.reporting.page.page import MAX_PAGE_BYTES, render_report
from pneumo.reporting.page.page_inputs import DataFacts, ModelFacts, Provenance
from pneumo.reporting.page.summary import find_warnings, summarise

__all__ = [
    "MAX_PAGE_BYTES",
    "DataFacts",
    "ModelFacts",
    "Provenance",
    "describe_duplicates",
    "find_warnings",
    "render_report",
    "summarise",
]
