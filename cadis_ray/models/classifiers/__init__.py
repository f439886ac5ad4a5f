"""Classifiers off the shelf, of timm, transformers and the CIFAR ResNets."""
