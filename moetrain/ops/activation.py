"""The nonlinearities of experts, elementwise in torch. Shapes: N rows, F hidden width."""

from torch import Tensor
from torch.nn import functional

from moetrain.config.model import Activation


def activate(h_NH: Tensor, activation: Activation) -> Tensor:
    """[N, 2F] -> [N, F] for swiglu (gate first, then up), [N, F] -> [N, F] otherwise."""
    if activation == "swiglu":
        gate_NF, up_NF = h_NH.chunk(2, dim=-1)
        return functional.silu(gate_NF) * up_NF
    if activation == "gelu":
        return functional.gelu(h_NH)
    if activation == "relu2":
        return functional.relu(h_NH).square()
    raise ValueError(f"activation must be 'swiglu', 'gelu' or 'relu2', got {activation!r}")
