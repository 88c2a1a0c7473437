"""An independent plain-torch model and training step, against which everything distributed is compared."""

from moetrain.oracle.model import BalanceInputs, Document, MicroBatch, loss_terms
from moetrain.oracle.parameters import parameter_shapes, random_parameters
from moetrain.oracle.step import OracleStep, OracleTrainer

__all__ = [
    "BalanceInputs",
    "Document",
    "MicroBatch",
    "OracleStep",
    "OracleTrainer",
    "loss_terms",
    "parameter_shapes",
    "random_parameters",
]
