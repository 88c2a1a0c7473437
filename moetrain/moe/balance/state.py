"""What balancing remembers between steps, for each MoE layer. Shapes: L MoE layers, E experts, X = E + 3 counters."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import BalanceConfig, MoELayerConfig
from moetrain.moe.balance.updates import sign_rule


@dataclass(frozen=True, slots=True, eq=False)
class BalanceReport:
    """How one optimizer step's choices were spread, over all ranks.

    Args:
        layers: indices of the MoE layers, ascending.
        max_vio: per layer, largest load over mean load minus 1 (0 is perfect balance).
        count_LE: int64 on the host, choices per layer and expert, before rounding.
        rows_added: per layer, fillers that rules (token rounding) admitted.
        rows_dropped: per layer, choices that they dropped.
    """

    layers: tuple[int, ...]
    max_vio: tuple[float, ...]
    count_LE: Tensor
    rows_added: tuple[int, ...]
    rows_dropped: tuple[int, ...]


class LayerBalance:
    """Counts and selection bias of one MoE layer.

    A layer reads only what the end of a step summed over all ranks, so its loss does not depend on how a step is split
    into micro-batches or over ranks.

    Attributes:
        lagged_count_E: int64, all ranks' choices in the previous step.
        bias_E: at least float32, added to scores for selection where balancing is loss-free.
        counter_X: int64, this rank's of this step: choices per expert, bad logits, pairs added and dropped by rules.
    """

    def __init__(self, config: BalanceConfig, counter_X: Tensor, dtype: torch.dtype) -> None:
        """Start balanced: equal shares, zero biases. ``dtype`` is the bias's (made at least float32)."""
        self._config = config
        self.counter_X = counter_X
        self.lagged_count_E = torch.zeros_like(counter_X[:-3])
        self.bias_E = torch.zeros_like(self.lagged_count_E, dtype=torch.promote_types(dtype, torch.float32))

    def share(self) -> Tensor:
        """float64 [E]: each expert's share of the previous step's choices; 1/E where nothing was counted."""
        count_E = self.lagged_count_E.double()
        total = count_E.sum()
        return torch.where(total > 0, count_E / total.clamp(min=1), 1.0 / count_E.shape[0])

    def selection_bias(self) -> Tensor | None:
        """[E], what selection adds to this layer's scores; None unless balancing is loss-free."""
        return self.bias_E if self._config.loss_free else None

    def add(self, count_E: Tensor) -> None:
        """Count one training micro-batch's choices (int64 [E])."""
        self.counter_X[:-3] += count_E

    def add_bad(self, bad_1: Tensor) -> None:
        """Remember, without reading it, whether a logit was NaN or Inf; the end of the step raises on it."""
        self.counter_X[-3] += bad_1.sum()

    def add_changes(self, added_E: Tensor, dropped_E: Tensor) -> None:
        """Count what a rule did to one training micro-batch (int64 [E] each)."""
        self.counter_X[-2:] += torch.stack((added_E.sum(), dropped_E.sum()))

    def kept(self) -> dict[str, Tensor]:
        """What one step leaves to the next."""
        return {"lagged_count_E": self.lagged_count_E, "bias_E": self.bias_E}

    def finish_step(self, count_E: Tensor) -> None:
        """Take the step's choices over all ranks, and move the bias."""
        self.lagged_count_E.copy_(count_E)
        if self._config.loss_free:
            sign_rule(self.lagged_count_E, self._config.bias_rate, self.bias_E)


class BalanceState:
    """The balance of every MoE layer that this rank has; ``finish_step`` is called once per optimizer step."""

    def __init__(
        self,
        layers: Sequence[int],
        config: MoELayerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start balanced. ``dtype`` is the biases' (made at least float32)."""
        # One tensor for all layers, so that the end of a step sends one message.
        self._counter_LX = torch.zeros(len(layers), config.moe.num_experts + 3, dtype=torch.int64, device=device)
        rows = zip(layers, self._counter_LX.unbind(), strict=True)
        self._layers = {layer: LayerBalance(config.balance, counter_X, dtype) for layer, counter_X in rows}

    @property
    def layers(self) -> tuple[int, ...]:
        """Indices of the MoE layers, ascending."""
        return tuple(self._layers)

    def __getitem__(self, layer: int) -> LayerBalance:
        """The balance of one layer."""
        return self._layers[layer]

    def finish_step(self, all_reduce: Callable[[Tensor], Tensor], *, skipped: bool = False) -> BalanceReport:
        """End an optimizer step: sum the counts over ranks, make them the lagged ones, move the biases.

        Args:
            all_reduce: sums an int64 tensor over all ranks that saw different tokens.
            skipped: no parameter was changed, so nothing that later steps learn from is either: biases and lagged
                counts stay, and the step's own counts are reported and forgotten. The same on every rank.

        Raises:
            FloatingPointError: on every rank, if any rank's router saw NaN or Inf.
        """
        total_LX = all_reduce(self._counter_LX.clone())
        self._counter_LX.zero_()
        host_LX = total_LX.cpu()
        bad_L, added_L, dropped_L = host_LX[:, -3:].T.tolist()
        bad = [layer for layer, flag in zip(self.layers, bad_L, strict=True) if flag]
        if bad:
            raise FloatingPointError(
                f"MoE layers {bad}: router logits held NaN or Inf during this step on some rank; lower the learning "
                "rate, or look at the layers before them"
            )
        if not skipped:
            for balance, total_X in zip(self._layers.values(), total_LX, strict=True):
                balance.finish_step(total_X[:-3])
        count_LE = host_LX[:, :-3].contiguous()
        vio = tuple(map(max_vio, count_LE))
        return BalanceReport(self.layers, vio, count_LE, tuple(added_L), tuple(dropped_L))

    def forget_step(self) -> None:
        """Drop what was counted since the last step's end."""
        self._counter_LX.zero_()

    def state_dict(self) -> dict[int, dict[str, Tensor]]:
        """What a checkpoint between two steps needs, by layer: copies of ``lagged_count_E`` and ``bias_E``."""
        return {layer: {k: v.clone() for k, v in balance.kept().items()} for layer, balance in self._layers.items()}

    def load_state_dict(self, state: Mapping[int, Mapping[str, Tensor]]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: if a tensor is missing or of another shape.
        """
        for layer, balance in self._layers.items():
            for name, mine in balance.kept().items():
                given = state.get(layer, {}).get(name)
                if given is None or given.shape != mine.shape:
                    came = "nothing" if given is None else list(given.shape)
                    raise ValueError(
                        f"BalanceState: {name} of layer {layer} must be {list(mine.shape)} (experts), got {came}; "
                        "load a checkpoint of the same model"
                    )
        for layer, balance in self._layers.items():
            for name, mine in balance.kept().items():
                mine.copy_(state[layer][name])
        self._counter_LX.zero_()


def max_vio(count_E: Tensor) -> float:
    """Largest load over mean load, minus 1 (2408.15664); 0 where nothing was counted."""
    total = int(count_E.sum())
    return int(count_E.max()) * count_E.numel() / total - 1.0 if total else 0.0
