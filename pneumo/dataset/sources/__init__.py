"""Folders of data sets -> studies: one file a layout, and which layout a folder has."""
