"""Folders of data sets -> studies: one file per layout, and the recognition of layouts."""
