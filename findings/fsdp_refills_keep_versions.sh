#!/usr/bin/env bash
# torch 2.13.0: FSDP2's gathered parameters and tensor versions.
#
# Guess: a parameter that has other values is another object, or its version has moved (as autograd relies on).
# Seen:  after an optimizer step the gathered parameter is the same object with the same version, and other values. What
#        is cached by (parameter, version), such as packed or quantised weights, is stale without a sign.
# Here:  whoever keeps something made of weights asks the expert store's epoch, not a version
#        (moetrain/placement/store.py).
# shellcheck source=findings/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"
install torch==2.13.0
cat >"$folder/show.py" <<'PYTHON'
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
layer = nn.Linear(4, 4, bias=False)
nn.init.ones_(layer.weight)
fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
optimizer = torch.optim.SGD(layer.parameters(), lr=0.25)
seen = []
for _ in range(2):
    layer(torch.ones(1, 4)).sum().backward()
    layer.unshard()
    seen.append((id(layer.weight), layer.weight._version, layer.weight[0, 0].item()))
    layer.reshard()
    optimizer.step()
    optimizer.zero_grad()
(first, version, value), (second, next_version, next_value) = seen
print(f"same object {first == second}, version {version} then {next_version}, value {value} then {next_value}")
print("guess: another object or another version")
dist.destroy_process_group()
raise SystemExit(not (first == second and version == next_version and (value, next_value) == (1.0, 0.75)))
PYTHON
verdict "$python" "$folder/show.py"
