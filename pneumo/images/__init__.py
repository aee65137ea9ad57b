"""One radiograph: DICOM bytes in, an 8-bit gray image out."""
