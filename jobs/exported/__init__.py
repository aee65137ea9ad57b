"""Files that `jobs.exporting` copies into every export, or fills in."""
