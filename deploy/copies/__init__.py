"""Copies of models and weights: a bundle for a host without a network, a local cache."""
