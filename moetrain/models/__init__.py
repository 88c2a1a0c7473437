"""Transformer blocks and whole models."""
