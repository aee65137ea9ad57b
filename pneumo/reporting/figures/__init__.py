"""Evaluation, Quality, studies -> pictures: values and arrays in, PNG, WebP or SVG bytes out."""
