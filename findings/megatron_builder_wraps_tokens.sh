#!/usr/bin/env bash
# megatron-core 0.16.1 (torch 2.13.0): IndexedDatasetBuilder, where a token id does not fit the dataset's dtype.
#
# Guess: it is refused, however the document is given.
# Seen:  a list of ids is refused by numpy; a tensor, which is what the builder's docstrings ask for, is converted, so
#        65,536 is written as 0 and 70,000 as 4,464, and reads back so without a word.
# Here:  our writer of the same format refuses the document (moetrain/data/indexed.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0 megatron-core==0.16.1
cat >"$folder/show.py" <<'PYTHON'
import sys

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

IDS = [65535, 65536, 70000]


def written(document):
    """What a reader finds of ``document``, or the name of the refusal."""
    builder = IndexedDatasetBuilder(f"{sys.argv[1]}/tokens.bin", dtype=np.uint16)
    try:
        builder.add_document(document, [len(IDS)])
    except Exception as error:
        return type(error).__name__
    builder.finalize(f"{sys.argv[1]}/tokens.idx")
    dataset = IndexedDataset(f"{sys.argv[1]}/tokens")
    return dataset[0].tolist()


of_list, of_tensor = written(IDS), written(torch.tensor(IDS))
print(f"{IDS} as a list: {of_list}, as a tensor: {of_tensor}; guess: both refused")
sys.exit((of_list, of_tensor) != ("OverflowError", [65535, 0, 4464]))
PYTHON
verdict "$python" "$folder/show.py" "$folder"
