"""From row numbers to batches. Shapes: B rows (0 in an empty lane), S tokens per row.

The loader keeps no position: step k of a run reads the rows [k·G, (k + 1)·G), G the global batch. A run is resumed by
naming its next row, on however many ranks.
"""

import numpy as np
import torch

from moetrain.config.errors import require_at_least
from moetrain.data.dataset import PackedDataset, PackedRow
from moetrain.sequence.batch import PackedBatch
from moetrain.sequence.plan import Sequence, SequencePlan


class StepLoader:
    """Reads what a SequencePlan asks of one rank in one round."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset

    def sequences(self, first_row: int, num_rows: int) -> list[Sequence]:
        """The rows from ``first_row``, as a planner wants them; fewer where the validation set ends."""
        require_at_least("first_row", first_row, 0)
        stop = first_row + num_rows
        if self.dataset.num_rows is not None:
            stop = min(stop, self.dataset.num_rows)
        return [
            Sequence(row_id, self.dataset.num_tokens(row_id), self.dataset.num_loss_tokens(row_id))
            for row_id in range(first_row, stop)
        ]

    def sequences_of_step(self, step: int, global_batch: int) -> list[Sequence]:
        """The global batch of ``step`` (from 0), equal on all ranks."""
        return self.sequences(step * global_batch, global_batch)

    def batch(self, plan: SequencePlan, rank: int, round_idx: int) -> PackedBatch:
        """What ``rank`` computes in one round of ``plan``; no rows where its lane is empty.

        Raises:
            ValueError: where a row's tokens are not what the plan was made from.
        """
        item = plan.item_at(rank, round_idx)
        if item is None:
            return PackedBatch.empty(self.dataset.seq_len)
        if len(item.ranks) > 1:
            raise ValueError(
                f"StepLoader: item {item.gid} spans ranks {item.ranks}; rows of a loader take one rank each"
            )
        wanted = {sequence.id: sequence.num_loss_tokens for sequence in plan.sequences}
        rows = [self.dataset.row(row_id) for row_id in item.sequence_ids]
        batch = _stack(rows, item.sequence_ids)
        num_loss_tokens = sum(wanted[row_id] for row_id in item.sequence_ids)
        if batch.num_loss_tokens != num_loss_tokens:
            raise ValueError(
                f"StepLoader: rows {item.sequence_ids} have {batch.num_loss_tokens} loss tokens, the plan says "
                f"{num_loss_tokens}; documents must end in EOD and hold no other: prepare the dataset again"
            )
        return batch


def _stack(rows: list[PackedRow], row_ids: tuple[int, ...]) -> PackedBatch:
    return PackedBatch(
        torch.from_numpy(np.stack([row.token_id_S for row in rows])),
        torch.from_numpy(np.stack([row.target_S for row in rows])),
        torch.from_numpy(np.stack([row.position_S for row in rows])),
        torch.from_numpy(np.stack([row.document_S for row in rows])),
        torch.tensor(row_ids, dtype=torch.int64),
        sum(row.num_tokens for row in rows),
    )
