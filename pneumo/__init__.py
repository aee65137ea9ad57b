"""Training and evaluation of a pneumonia classifier on frontal chest X-rays. Research use only.

The science lives here and runs without Ray, Kubernetes or W&B. `jobs` runs it on a Ray cluster,
`cluster` submits those jobs from a laptop. Importing this package loads nothing heavy.
"""

__version__ = "0.1.0"
