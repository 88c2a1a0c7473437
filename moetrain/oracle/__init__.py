"""An independent plain-torch model and training step, against which everything distributed is compared."""
