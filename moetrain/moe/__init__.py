"""The MoE layer: router, balance, dispatch, experts. It never asks how many ranks there are."""
