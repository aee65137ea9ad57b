"""The network: backbones for gray images with one logit, scoring with them, Grad-CAM."""
