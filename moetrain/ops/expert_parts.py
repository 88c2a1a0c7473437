"""``expert_mlp`` from products, gathers and sums, on any device: what CUDA tensors get where no kernel of its own fits.

Shapes: R rows, D width, F hidden width, P = 2F with a gate and F without, N (row, expert) pairs (a capacity), E
experts, S slots. The algorithm is that of the kernels (SonicMoE, arXiv 2512.14080): the backward pass keeps X and H
``[N, P]`` alone. Beside those a pass holds at most N * (P + F + D) elements, and fp32 temporaries of some thousand
pairs. Only with the products named "loop" does it wait for the device.
"""

import torch
from torch import Tensor
from torch.nn import functional

from moetrain.config.moe import Activation
from moetrain.ops.activation import activate, activate_backward
from moetrain.ops.expert_inputs import ExpertInputs
from moetrain.ops.expert_products import Groups, Products, products
from moetrain.ops.native import OPS
from moetrain.ops.row_lists import zero_tail_

H_COLUMNS = 64  # H is kept in blocks of so many columns, the last one padded
PAIRS_AT_A_TIME = 1 << 14  # that exist in fp32


class Parts:
    """One call: its inputs, and what every step needs of them."""

    def __init__(self, inputs: ExpertInputs, activation: Activation, products_name: str) -> None:
        OPS.check_expert_mlp(*inputs, activation)
        self.x_RD, self.row_N, self.weight_N, self.offset_E1, w_in, self.w_out, self.slot_E, b_in, self.b_out = inputs
        self.w_in_SPD = w_in.flatten(1, 2)
        self.b_in_SP = None if b_in is None else b_in.flatten(1, 2)
        self.activation = activation
        self.products: Products = products(products_name, Groups(self.offset_E1, self.slot_E, inputs.num_slots))

    def hidden(self) -> Tensor:
        """H: the pre-activations of each pair, with their bias."""
        h_NP = self.products.by_rows(self.x_RD, self.w_in_SPD, self.row_N)
        return self.add_bias(h_NP, self.b_in_SP)

    def output(self, h_NP: Tensor) -> Tensor:
        """Y [R, D] from H. The weights are in A already, but not in the bias."""
        a_NF = h_NP.new_empty(h_NP.shape[0], self.w_out.shape[2])
        for h, weight, a in self.pieces(h_NP, self.weight_N, a_NF):
            a.copy_(weight[:, None] * activate(_wide(h), self.activation))
        y_ND = self.products.by_rows(a_NF, self.w_out)
        y_ND = self.add_bias(y_ND, self.b_out, self.weight_N)
        return OPS.scatter_add_rows(y_ND, self.row_N, None, self.offset_E1, self.x_RD.shape[0])

    def hidden_grad(self, dy: Tensor, dy_row_N: Tensor | None, h_NP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """dH, A (weighted) and the gradient of the weights, from dY of each pair and H."""
        da_NF = self.products.by_columns(dy, self.w_out, dy_row_N)
        dh_NP, dweight_N = h_NP.new_empty(h_NP.shape), torch.empty_like(self.weight_N)
        for h, da, weight, dh, dweight in self.pieces(h_NP, da_NF, self.weight_N, dh_NP, dweight_N):
            da_wide, weight_N1 = _wide(da), weight[:, None]
            a_wide, dh_wide = activate_backward(weight_N1 * da_wide, _wide(h), self.activation)
            torch.sum(a_wide * da_wide, dim=1, out=dweight)
            dh.copy_(dh_wide)
            da.copy_(weight_N1 * a_wide)  # A, where dA' is needed no more
        return dh_NP, da_NF, dweight_N

    def slot_of_pairs(self) -> Tensor:
        """[N]; beyond the list's end some slot that exists."""
        pair_N = torch.arange(self.row_N.shape[0], dtype=torch.int32, device=self.row_N.device)
        expert_N = torch.searchsorted(self.offset_E1[1:], pair_N, right=True, out_int32=True)
        expert_N.clamp_(max=self.offset_E1.shape[0] - 2)
        return expert_N if self.slot_E is None else self.slot_E[expert_N.long()]

    def add_bias(self, c_NX: Tensor, b_SX: Tensor | None, weight_N: Tensor | None = None) -> Tensor:
        """Add each pair's slot of the bias, times its weight where there is one."""
        if b_SX is None:
            return c_NX
        slot_N = self.slot_of_pairs()
        for c, slot, weight in self.pieces(c_NX, slot_N, self.weight_N):
            b_wide = _wide(b_SX[slot.long()])
            c.copy_(_wide(c) + (b_wide if weight_N is None else weight[:, None] * b_wide))
        return c_NX

    def add_bias_to_weight_grad(self, dweight_N: Tensor, dy_RD: Tensor) -> None:
        """Add <dY, b_out> of each pair."""
        if self.b_out is None:
            return
        in_list_N = torch.arange(self.row_N.shape[0], device=self.row_N.device) < self.offset_E1[-1]
        row_N = self.row_N.where(in_list_N, 0)
        for dweight, row, slot in self.pieces(dweight_N, row_N, self.slot_of_pairs()):
            dweight += (_wide(dy_RD[row.long()]) * _wide(self.b_out[slot.long()])).sum(dim=1)

    def bias_grads(self, dh_NP: Tensor, dy_RD: Tensor) -> tuple[Tensor, Tensor]:
        """Of b_in, as [S, P], and b_out; empty where there is no bias."""
        db_in_SP, db_out = dh_NP.new_empty(0), dh_NP.new_empty(0)
        if self.b_in_SP is None and self.b_out is None:
            return db_in_SP, db_out
        slot_N = self.slot_of_pairs()
        num_slots = self.w_out.shape[0]
        if self.b_in_SP is not None:
            db_in_SP = OPS.scatter_add_rows(dh_NP, slot_N, None, self.offset_E1, num_slots)
        if self.b_out is not None:
            dy_ND = OPS.gather_rows(dy_RD, self.row_N, self.offset_E1)
            db_out = OPS.scatter_add_rows(dy_ND, slot_N, self.weight_N, self.offset_E1, num_slots)
        return db_in_SP, db_out

    def pieces(self, *lists: Tensor) -> list[tuple[Tensor, ...]]:
        """The lists of pairs cut into views of so few that they may be in fp32."""
        return list(zip(*(tensor.split(PAIRS_AT_A_TIME) for tensor in lists), strict=True))


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@torch.library.register_fake("moetrain::check_expert_mlp")
def _check_expert_mlp_fake(*args: object) -> None:
    return None


def h_columns(w_in: Tensor) -> int:
    """Columns of H as it is kept: a block holds 32 of the gate and 32 of the up projection, or 64 without a gate."""
    _, halves, hidden, _ = w_in.shape
    hidden_per_block = H_COLUMNS // halves
    return (hidden + hidden_per_block - 1) // hidden_per_block * H_COLUMNS


def forward_of_parts(
    inputs: ExpertInputs, activation: Activation, save_h: bool, products: str
) -> tuple[Tensor, Tensor]:
    """As the operator ``expert_mlp``: Y, and H in ``h_columns`` columns where it shall be kept (else empty).

    ``products`` is "simple", "grouped_mm" or "loop". No gradient passes through.
    """
    parts = Parts(inputs, activation, products)
    num_columns = h_columns(inputs.w_in)
    if not inputs.have_work():
        h_shape = (inputs.row_N.shape[0], num_columns) if save_h else 0
        return inputs.x_RD.new_zeros(inputs.x_RD.shape), inputs.x_RD.new_empty(h_shape)
    h_NP = parts.hidden()
    y_RD = parts.output(h_NP)
    if not save_h:
        return y_RD, h_NP.new_empty(0)
    padding = num_columns - h_NP.shape[1]
    return y_RD, functional.pad(h_NP, (0, padding)) if padding else h_NP


def backward_of_parts(
    dy_RD: Tensor, inputs: ExpertInputs, h: Tensor | None, activation: Activation, products: str
) -> tuple[Tensor, ...]:
    """As the operator ``expert_mlp_backward``: the gradients of x, weight, w_in, w_out, b_in and b_out.

    The last two are empty where there is no bias.
    """
    parts = Parts(inputs, activation, products)
    if not inputs.have_work():
        return tuple(grad.zero_() for grad in inputs.empty_grads())
    h_NP = parts.hidden() if h is None else h[:, : parts.w_in_SPD.shape[1]]
    dy, dy_row_N = parts.products.rows(dy_RD, inputs.row_N)
    dh_NP, a_NF, dweight_N = parts.hidden_grad(dy, dy_row_N, h_NP)
    dw_out = parts.products.over_pairs(dy, a_NF, row_a_M=dy_row_N)
    del dy, a_NF
    dw_in = parts.products.over_pairs(dh_NP, inputs.x_RD, row_b_M=inputs.row_N).view(inputs.w_in.shape)
    parts.add_bias_to_weight_grad(dweight_N, dy_RD)
    db_in_SP, db_out = parts.bias_grads(dh_NP, dy_RD)
    dx_ND = parts.products.by_columns(dh_NP, parts.w_in_SPD)
    dx_RD = OPS.scatter_add_rows(dx_ND, inputs.row_N, None, inputs.offset_E1, inputs.x_RD.shape[0])
    db_in = db_in_SP if inputs.b_in is None else db_in_SP.view(inputs.b_in.shape)
    return dx_RD, zero_tail_(dweight_N, inputs.offset_E1), dw_in, dw_out, db_in, db_out
