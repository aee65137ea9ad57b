"""Files that stand in every export as they stand here; see `jobs.exporting`."""
