"""What balancing remembers between steps, for all MoE layers. Shapes: L MoE layers, E experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.config import MoELayerConfig


@dataclass(frozen=True, slots=True, eq=False)
class BalanceReport:
    """How one optimizer step's choices were spread, over all ranks.

    Args:
        layers: indices of the MoE layers, ascending.
        max_vio: per layer, largest load over mean load minus 1 (0 is perfect balance).
        count_LE: int64 on the host, choices per layer and expert, before rounding.
        rows_added: per layer, fillers that token rounding admitted.
        rows_dropped: per layer, choices that it dropped.
    """

    layers: tuple[int, ...]
    max_vio: tuple[float, ...]
    count_LE: Tensor
    rows_added: tuple[int, ...]
    rows_dropped: tuple[int, ...]


class BalanceState:
    """Counts and selection biases of every MoE layer of a model.

    ``add`` is called by each layer for each training micro-batch, ``finish_step`` once per optimizer step. Only what
    ``finish_step`` summed over all ranks is ever read by a layer, so a layer's loss does not depend on how a step is
    split into micro-batches or over ranks.
    """

    def __init__(
        self,
        layers: Sequence[int],
        config: MoELayerConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Start balanced: equal shares, zero biases. ``dtype`` is the biases' (made at least float32)."""
        self.layers = tuple(layers)
        self._row = {layer: row for row, layer in enumerate(self.layers)}
        self._config = config
        shape = (len(self.layers), config.moe.num_experts)
        self._lagged_LE = torch.zeros(shape, dtype=torch.int64, device=device)
        self._count_LE = torch.zeros_like(self._lagged_LE)
        self._bad_L = torch.zeros(shape[0], dtype=torch.int64, device=device)
        self._rounded_L2 = torch.zeros(shape[0], 2, dtype=torch.int64, device=device)
        self._bias_LE = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32), device=device)

    def share(self, layer: int) -> Tensor:
        """float64 [E]: each expert's share of the previous step's choices; 1/E where nothing was counted."""
        count_E = self._lagged_LE[self._row[layer]].double()
        total = count_E.sum()
        return torch.where(total > 0, count_E / total.clamp(min=1), 1.0 / self._config.moe.num_experts)

    def bias(self, layer: int) -> Tensor | None:
        """[E], what selection adds to this layer's scores; None unless balancing is loss-free."""
        return self._bias_LE[self._row[layer]] if self._config.balance.loss_free else None

    def add(self, layer: int, count_E: Tensor) -> None:
        """Count one training micro-batch's choices (int64 [E])."""
        self._count_LE[self._row[layer]] += count_E

    def add_bad(self, layer: int, bad_1: Tensor) -> None:
        """Remember, without reading it, whether a logit was NaN or Inf; ``finish_step`` raises on it."""
        self._bad_L[self._row[layer]] += bad_1.sum()

    def add_rounded(self, layer: int, added_E: Tensor, dropped_E: Tensor) -> None:
        """Count what token rounding did to one training micro-batch (int64 [E] each)."""
        self._rounded_L2[self._row[layer]] += torch.stack((added_E.sum(), dropped_E.sum()))

    def finish_step(self, all_reduce: Callable[[Tensor], Tensor], *, skipped: bool = False) -> BalanceReport:
        """End an optimizer step: sum the counts over ranks, make them the lagged ones, move the biases.

        Args:
            all_reduce: sums an int64 tensor over all ranks that saw different tokens, returning a new tensor.
            skipped: no parameter was changed, so nothing that later steps learn from is either: biases and lagged
                counts stay, and the step's own counts are reported and forgotten. The same on every rank.

        Raises:
            FloatingPointError: on every rank, if any rank's router saw NaN or Inf.
        """
        total_LX = all_reduce(torch.cat((self._count_LE, self._bad_L[:, None], self._rounded_L2), dim=1))
        self._forget_step()
        host_LX = total_LX.cpu()
        bad_L, added_L, dropped_L = host_LX[:, -3:].T.tolist()
        bad = [layer for layer, flag in zip(self.layers, bad_L, strict=True) if flag]
        if bad:
            raise FloatingPointError(
                f"MoE layers {bad}: router logits held NaN or Inf during this step on some rank; lower the learning "
                "rate, or look at the layers before them"
            )
        if not skipped:
            self._lagged_LE = total_LX[:, :-3].contiguous()
            if self._config.balance.loss_free:
                self._move_biases()
        count_LE = host_LX[:, :-3].contiguous()
        vio = tuple(map(max_vio, count_LE))
        return BalanceReport(self.layers, vio, count_LE, tuple(added_L), tuple(dropped_L))

    def _forget_step(self) -> None:
        for counted in (self._count_LE, self._bad_L, self._rounded_L2):
            counted.zero_()

    def _move_biases(self) -> None:
        """Sign rule: b += u * sign(mean(c) - c), in whole numbers, so balance is exact (2408.15664)."""
        count_LE = self._lagged_LE
        direction_LE = (count_LE.sum(dim=1, keepdim=True) - count_LE * self._config.moe.num_experts).sign()
        self._bias_LE += self._config.balance.bias_rate * direction_LE.to(self._bias_LE.dtype)

    def state_dict(self) -> dict[str, Tensor]:
        """What a checkpoint between two steps needs."""
        return {"lagged_count_LE": self._lagged_LE.clone(), "bias_LE": self._bias_LE.clone()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what ``state_dict`` gave.

        Raises:
            ValueError: if a tensor is missing or of another shape.
        """
        for name, mine in (("lagged_count_LE", self._lagged_LE), ("bias_LE", self._bias_LE)):
            if name not in state or state[name].shape != mine.shape:
                came = list(state[name].shape) if name in state else "nothing"
                raise ValueError(
                    f"BalanceState: {name} must be {list(mine.shape)} (MoE layers, experts), got {came}; "
                    "load a checkpoint of the same model"
                )
        for name, mine in (("lagged_count_LE", self._lagged_LE), ("bias_LE", self._bias_LE)):
            mine.copy_(state[name])
        self._forget_step()


def max_vio(count_E: Tensor) -> float:
    """Largest load over mean load, minus 1 (2408.15664); 0 where nothing was counted."""
    total = int(count_E.sum())
    return int(count_E.max()) * count_E.numel() / total - 1.0 if total else 0.0
