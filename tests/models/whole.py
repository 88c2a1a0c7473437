"""Small models and batches, and what they hold, under logical names: for tests of ``moetrain.models``."""

import math
from itertools import accumulate, pairwise

import torch
from known import grad_of
from layer_configs import layer_config
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.config import ModelConfig, MoELayerConfig
from moetrain.mesh.folded_mesh import FoldedMesh
from moetrain.models.transformer import Transformer
from moetrain.moe.balance.state import BalanceState
from moetrain.moe.dispatch.local import LocalDispatcher
from moetrain.moe.layer import LayerServices, MoELayer
from moetrain.oracle import Document, MicroBatch
from moetrain.placement.chunks import ExpertShape
from moetrain.placement.static import plan_static
from moetrain.placement.store import ExpertStore
from moetrain.sequence.batch import PackedBatch, Piece

MODEL = ModelConfig(
    vocab_size=37, num_layers=3, width=16, num_heads=4, num_kv_heads=2, head_dim=4, dense_first=1, dense_width=20,
    qk_norm=True, qkv_bias=True,
)  # fmt: skip
MOE = layer_config(num_experts=6, top_k=2, expert_width=8, shared_width=12, shared_gate=True)


def make_batch(rows: list[list[int]], *, vocab: int = 37, seed: int = 0) -> PackedBatch:
    """Rows of documents of the given lengths, which have the ids 100, 101 and so on."""
    generator = torch.Generator().manual_seed(seed)
    pieces = []
    for row, lengths in enumerate(rows):
        for begin, end in pairwise([0, *accumulate(lengths)]):
            pieces.append(Piece(100 + row, begin, end, begin))
    size = sum(piece.stop - piece.start for piece in pieces)
    token_T = torch.randint(vocab, (size,), generator=generator)
    target_T = torch.randint(vocab, (size,), generator=generator)
    target_T[[end - 1 for end in accumulate(piece.stop - piece.start for piece in pieces)]] = -1
    return PackedBatch(token_T, target_T, tuple(pieces))


def documents_of(batch: PackedBatch) -> MicroBatch:
    """The same tokens as the oracle takes them: one document at a time."""
    documents = [
        Document(batch.token_id_T[begin:end], batch.target_T[begin:end], torch.arange(end - begin))
        for begin, end in pairwise(batch.offsets().tolist())
    ]
    return MicroBatch(tuple(documents))


def one_process_model(
    model: ModelConfig, config: MoELayerConfig, dtype: torch.dtype, *, activation_checkpoint: bool = False
) -> tuple[Transformer, ExpertStore, BalanceState]:
    """A model without process groups; its parameters are not filled yet."""
    mesh = FoldedMesh()
    placement = plan_static(mesh, config.moe.num_experts)
    shape = ExpertShape(width=model.width, hidden=config.moe.expert_width, gated=config.moe.gated)
    store = ExpertStore(
        shape,
        dict.fromkeys(model.moe_layers, placement),
        None,
        0,
        compute_dtype=dtype,
        master_dtype=torch.promote_types(dtype, torch.float32),
        device="cpu",
    )
    balance = BalanceState(model.moe_layers, config, dtype=dtype)
    dispatcher = LocalDispatcher(config.moe.num_experts)
    network = Transformer(
        model,
        config.moe,
        lambda layer: MoELayer(model.width, config, layer, LayerServices(store, dispatcher, balance[layer])),
        activation_checkpoint,
    ).to(dtype)
    return network, store, balance


@torch.no_grad()
def load(network: nn.Module, store: ExpertStore, params: dict[str, Tensor]) -> None:
    """Fill a one-process model from whole tensors."""
    for name, parameter in network.named_parameters():
        parameter.copy_(params[name])

    def values(layer: int, expert: int, index_N: Tensor) -> Tensor:
        stem = f"layers.{layer}.moe.experts"
        parts = (params[f"{stem}.w_in"][expert], params[f"{stem}.w_out"][expert])
        return torch.cat([part.flatten() for part in parts])[index_N]

    store.initialise(values)


def whole_values(network: nn.Module, store: ExpertStore, *, gradients: bool = False) -> dict[str, Tensor]:
    """All parameters (or their gradients) by logical name, whole. Collective where the model is sharded."""
    found = {}
    for name, parameter in network.named_parameters():
        value = parameter.grad if gradients else parameter.detach()
        if value is None:
            raise AssertionError(f"{name} has no gradient")
        found[name] = value.full_tensor() if isinstance(value, DTensor) else value.clone()
    split = math.prod(store.shape.w_in_shape)
    for layer, owned in store.owned_parameters().items():
        flat = store.full_expert(layer, {layer: grad_of(owned)} if gradients else "master")
        flat_EP = torch.stack([flat[expert] for expert in sorted(flat)])
        stem = f"layers.{layer}.moe.experts"
        found[f"{stem}.w_in"] = flat_EP[:, :split].reshape(-1, *store.shape.w_in_shape)
        found[f"{stem}.w_out"] = flat_EP[:, split:].reshape(-1, *store.shape.w_out_shape)
    return found


def largest_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """max over tensors of max|a - b| / max(max|b|, 0.01 g), g the largest element of all."""
    assert got.keys() == want.keys()
    largest = max(float(tensor.abs().max()) for tensor in want.values())
    return max(
        float((got[name] - want[name]).abs().max()) / max(float(want[name].abs().max()), 0.01 * largest)
        for name in want
    )
