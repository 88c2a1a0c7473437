"""Every operator once on a GPU, on small uneven shapes, against the same operator on the CPU.

    python benchmarks/gpu_smoke.py                                    each case in a process of its own, some at a time
    python benchmarks/gpu_smoke.py --only 'expert_mlp sm90'
    compute-sanitizer --tool memcheck python benchmarks/gpu_smoke.py --here
    python benchmarks/gpu_smoke.py --device cpu --here                a rehearsal without a GPU

A case that hangs or crashes costs its own process alone and is reported as such. The tests say more; this says in
seconds, on hardware that the kernels have never met, which of them run at all.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

import torch
from torch import Tensor

from moetrain.ops import (
    add_sources,
    assign_seats,
    chunk_table,
    expert_mlp,
    gather_rows,
    group_pairs,
    grouped_gemm,
    grouped_gemm_varlen_k,
    pack_chunks,
    route,
    scatter_add_rows,
    select_experts,
    unpack_chunks,
)
from moetrain.ops.cuda_path import CUDA_PATHS, VARIABLE

T, D, F, E, K = 333, 264, 136, 7, 3
NOT_HERE = 77  # exit code of a case that says that it cannot run on this device
Answers = Sequence[Tensor]


class Inputs:
    """The same numbers on any device."""

    def __init__(self, device: str) -> None:
        self.random, self.device = torch.Generator().manual_seed(0), device
        self.x_TD = self.normal(T, D)
        self.logits_TE = self.normal(T, E, dtype=torch.float32)
        expert_id_TK = self.logits_TE.detach().cpu().topk(K).indices.to(torch.int32)
        pair_N, offset_E1 = group_pairs(expert_id_TK.flatten(), E)
        self.expert_id_TK, self.offset_E1 = expert_id_TK.to(device), offset_E1.to(device)
        self.token_N = torch.div(pair_N, K, rounding_mode="floor").to(device)
        self.weight_N = torch.rand(T * K, generator=self.random).to(device).requires_grad_()

    def normal(self, *sizes: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return (torch.randn(*sizes, generator=self.random) * scale).to(self.device, dtype).requires_grad_()

    def with_gradients(self, y: Tensor, *leaves: Tensor) -> Answers:
        """y and the gradients of a weighted sum of it."""
        pull = torch.randn(y.shape, generator=self.random).to(self.device, y.dtype)
        return y, *torch.autograd.grad(y, leaves, pull)


def moved_rows(given: Inputs) -> Answers:
    return given.with_gradients(gather_rows(given.x_TD, given.token_N), given.x_TD)


def summed_rows(given: Inputs) -> Answers:
    y_ND = given.normal(T * K, D)
    sums_TD = scatter_add_rows(y_ND, given.token_N, given.weight_N, num_rows=T)
    return given.with_gradients(sums_TD, y_ND, given.weight_N)


def grouped(given: Inputs) -> Answers:
    return group_pairs(given.expert_id_TK.flatten(), E)


def seated(given: Inputs) -> Answers:
    seat_offset_E1, holder_Z = [0, 3, 4, 6, 8, 9, 12, 16], [0, 2, 5, 1, 0, 4, 3, 5, 2, 1, 2, 3, 0, 1, 4, 5]
    share_Z = [1 + z % 5 for z in range(16)]
    seats = (torch.tensor(x, dtype=torch.int32, device=given.device) for x in (seat_offset_E1, holder_Z, share_Z))
    lists = (given.token_N, given.offset_E1, *seats)
    return assign_seats(*lists, num_tokens=T, num_groups=6, source=2, domain_size=3)


def selected(given: Inputs) -> Answers:
    chosen = select_experts(given.logits_TE, K)
    return chosen.expert_id_TK, *given.with_gradients(chosen.weight_TK, given.logits_TE)


def routed(given: Inputs) -> Answers:
    found = route(given.logits_TE, K)
    return found.token_N, found.offset_E1, *given.with_gradients(found.weight_N, given.logits_TE)


def product(given: Inputs) -> Answers:
    w_EFD = given.normal(E, F, D, scale=D**-0.5)
    y_NF = grouped_gemm(given.x_TD, w_EFD, given.offset_E1, row_M=given.token_N)
    return given.with_gradients(y_NF, given.x_TD, w_EFD)


def product_over_rows(given: Inputs) -> Answers:
    h_NF = given.normal(T * K, F)
    return (grouped_gemm_varlen_k(h_NF, given.x_TD, given.offset_E1, row_b_M=given.token_N, num_slots=E),)


def chunks(given: Inputs) -> Answers:
    source = given.normal(T * D, dtype=torch.float32).detach()
    rows = [(5, 3, 1000), (1100, 1003, 7), (2000, 1010, 40001)]
    packed = pack_chunks(source, chunk_table(rows, 3, given.device), 41011, torch.bfloat16)[3:]
    target = torch.zeros_like(source)
    unpack_chunks(target, packed.contiguous(), chunk_table([(0, 11, 1000), (1007, 2000, 40001)], 3, given.device))
    total = torch.zeros_like(source)
    terms = [(0, 0, 7, 30000), (1, 9, 7, 30000), (1, 0, 40000, 333)]
    add_sources(total, (source, target), chunk_table(terms, 4, given.device))
    return packed, target, total


def experts(given: Inputs) -> Answers:
    leaves = (
        given.x_TD,
        given.weight_N,
        given.normal(E, 2, F, D, scale=D**-0.5),
        given.normal(E, D, F, scale=F**-0.5),
        given.normal(E, 2, F),
        given.normal(E, D),
    )
    x_TD, weight_N, w_in, w_out, b_in, b_out = leaves
    y_TD = expert_mlp(x_TD, given.token_N, weight_N, given.offset_E1, w_in, w_out, b_in=b_in, b_out=b_out)
    return given.with_gradients(y_TD, *leaves)


CASES: dict[str, tuple[Callable[[Inputs], Answers], str | None]] = {
    "gather_rows": (moved_rows, None),
    "scatter_add_rows": (summed_rows, None),
    "group_pairs": (grouped, None),
    "assign_seats": (seated, None),
    "select_experts": (selected, None),
    "route": (routed, None),
    "chunks": (chunks, None),
    **{f"grouped_gemm {path}": (product, path) for path in ("sm90", "sm80", "simple")},
    **{f"grouped_gemm_varlen_k {path}": (product_over_rows, path) for path in ("sm90", "sm80", "simple")},
    **{f"expert_mlp {path}": (experts, path) for path in CUDA_PATHS},
}


def differ(mine: Answers, wanted: Answers) -> str | None:
    """What is wrong, or None. Integers are exact; numbers may be off by some roundings of the largest."""
    for idx, (one, other) in enumerate(zip(mine, wanted, strict=True)):
        one, other = one.detach().cpu(), other.detach().cpu()
        if not one.is_floating_point():
            if not torch.equal(one, other):
                return f"answer {idx}: {int((one != other).sum())} of {one.numel()} integers are wrong"
            continue
        error, largest = (one.double() - other.double()).abs().max().item(), other.double().abs().max().item()
        bound = (8 * torch.finfo(one.dtype).eps + 1e-5) * largest
        if not error <= bound:
            return f"answer {idx}: the largest error is {error:.3g}, at most {bound:.3g} was expected"
    return None


def run_here(name: str, device: str) -> tuple[int, str]:
    """Exit code and what to say."""
    call, path = CASES[name]
    os.environ.pop(VARIABLE, None)
    wanted = call(Inputs("cpu"))
    if path is not None and device != "cpu":
        os.environ[VARIABLE] = path
    try:
        wrong = differ(call(Inputs(device)), wanted)
    except ValueError as refused:
        if VARIABLE not in str(refused):
            raise
        return NOT_HERE, f"not here: {refused}"
    return (0, "ok") if wrong is None else (1, f"WRONG, {wrong}")


def run_apart(name: str, device: str, seconds: float) -> tuple[int, str]:
    """The same in a process of its own."""
    command = [sys.executable, __file__, "--device", device, "--here", "--only", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return 1, f"HUNG, or took longer than {seconds:g} s"
    said = (done.stdout if done.returncode in (0, 1) and done.stdout else done.stderr).strip().splitlines()
    last = said[-1].removeprefix(f"{name}: ") if said else ""
    return done.returncode, last if done.returncode in (0, 1) else f"DIED with code {done.returncode}: {last}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default=None, choices=CASES, help="one case")
    parser.add_argument("--here", action="store_true", help="in this process, one after another")
    parser.add_argument("--seconds", type=float, default=40, help="that a case may take in a process of its own")
    parser.add_argument("--at-once", type=int, default=6, help="processes")
    chosen = parser.parse_args()
    names = list(CASES) if chosen.only is None else [chosen.only]
    if chosen.here:  # under a slow checker time may end before the list does: what is hardest to get right comes first
        names.sort(key=lambda name: not name.startswith(("expert_mlp sm", "grouped_gemm")))
    failed = 0

    def one(name: str) -> tuple[int, str]:
        if chosen.here:
            return run_here(name, chosen.device)
        return run_apart(name, chosen.device, chosen.seconds)

    with ThreadPoolExecutor(1 if chosen.here else chosen.at_once) as workers:
        jobs = {workers.submit(one, name): name for name in names}
        for job in as_completed(jobs):
            code, text = job.result()
            print(f"{jobs[job]}: {text}", flush=True)
            failed += code not in (0, NOT_HERE)
    sys.exit(min(failed, 1))


if __name__ == "__main__":
    main()
