"""The network: backbones with a one-channel first convolution and one logit."""
