"""The CUDA side of router, rounding and seats as it stands in csrc/ops, with launchers and kernels, run on the host.

The operators are compiled against stand-ins for torch's CUDA headers, the launchers against the emulation, and both are
compared with the CPU's operators. What this shows: pointers, strides, shapes, scratch and lists that the operators hand
to the kernels.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from emulated_kernels import (
    BUILD,
    CSRC,
    FLAGS,
    TESTS,
    compile_to,
    emulation,
    hash_of,
    includes_of,
    inputs_of,
    rewrite_kernel,
)
from emulated_kernels import tests_of as cpp_of_tests
from ops.seat_cases import case_of
from torch import Tensor
from torch.utils.cpp_extension import include_paths, library_paths

from moetrain.ops import offer_pairs, route
from moetrain.ops.native import OPS

pytestmark = pytest.mark.slow  # a minute of compilation

GLUE = TESTS / "torch"
FOLDER = BUILD / "routing"
OPERATORS = ["rounding/round_pairs_cuda.cpp"]
OPERATORS += [f"routing/{name}_cuda.cpp" for name in ("assign_seats", "group_pairs", "route", "select_experts")]
HEADERS = ["rounding/round_pairs.h", "routing/assign_seats.h"]
LAUNCHERS = [
    "routing/assign_seats.cu",
    "routing/group_pairs.cu",
    "rounding/offer_pairs.cu",
    "rounding/round_pairs.cu",
    "routing/select_experts.cu",
    "routing/select_experts_backward.cu",
]
CHECKS = [GLUE / "rounding_checks.cpp", *sorted((CSRC / "cpu" / "rounding").glob("*.cpp"))]
CHECKS += [CSRC / "cpu" / "routing" / f"{name}.cpp" for name in ("assign_seats", "group_pairs")]
CHECKED_BY = [CSRC / "ops" / f"{name}_cpu.cpp" for name in ("rounding/round_pairs", "routing/assign_seats")]
RULES = ("nearest", "stochastic", "nearest_score", "balance", "up", "down")
Ops = torch._ops._OpNamespace

# What breaks between the operators' inputs and their launches, and what is then wrong.
MUTANTS = [
    ("rounding/round_pairs.h", ".stride = in.score_TE.stride(0)", ".stride = in.score_TE.size(1)", "offers"),
    ("rounding/round_pairs_cuda.cpp", "(in, token_gid_T2, valid_T, tile)", "(in, token_gid_T2, {}, tile)", "offers"),
    (
        "rounding/round_pairs_cuda.cpp",
        "(given, offers, tile, parsed, key)",
        "(given, offers, tile, parsed, 0)",
        "rounded",
    ),
    (
        "rounding/round_pairs_cuda.cpp",
        "round_input(given, offers, tile",
        "round_input(given, {offers.offers_WEX, offers.offer_token_E2M, {}, offers.rank}, tile",
        "rounded",
    ),
    ("routing/route_cuda.cpp", "static_cast<int32_t>(o.top_k)", "1", "token"),
    (
        "routing/select_experts_cuda.cpp",
        ".place_TK = data_or_null<int32_t>(place_TK)",
        ".place_TK = nullptr",
        "gradient",
    ),
    ("routing/assign_seats_cuda.cpp", "to_group.mutable_data_ptr", "seat_N.mutable_data_ptr", "seats"),
    ("routing/assign_seats.h", ".source = from.source,", ".source = 0,", "seats"),
    ("routing/assign_seats.h", "std::min(from.domain_size, ", "std::min<int64_t>(1, ", "seats"),
]


def load_operators(name: str, broken: tuple[str, str] | None = None) -> Ops:
    """``torch.ops.NAME`` with the operators of csrc/ops, of which one file's text may be another."""
    copies = FOLDER / name / "ops"
    for operator in [*OPERATORS, *HEADERS]:
        (copies / operator).parent.mkdir(parents=True, exist_ok=True)
        text = (CSRC / "ops" / operator).read_text()
        (copies / operator).write_text(broken[1] if broken and broken[0] == operator else text)
    inputs = [*inputs_of(CSRC), *emulation(), *cpp_of_tests(TESTS), *CHECKS, *CHECKED_BY]
    kernel_mark, mark = hash_of(*inputs), hash_of(*inputs, *(copies / operator for operator in [*OPERATORS, *HEADERS]))
    flags = [*FLAGS, "-fPIC", *includes_of(CSRC)]
    runner = [path for path in emulation() if path.suffix == ".cpp"]
    kernels = [rewrite_kernel(CSRC / "cuda" / launcher, FOLDER) for launcher in LAUNCHERS]
    objects = [
        compile_to(FOLDER / f"{path.stem}.{kernel_mark}.o", [*flags, "-c", path]) for path in [*kernels, *runner]
    ]
    system = [flag for path in include_paths() for flag in ("-isystem", path)]
    torch_flags = [f"-I{FOLDER / name}", f"-I{GLUE}", *flags, *system, "-Wno-unused-function"]
    objects += [
        compile_to(FOLDER / f"{path.stem}.checks.{kernel_mark}.o", [*torch_flags, "-c", path]) for path in CHECKS
    ]
    named = [*torch_flags, f"-DMOETRAIN_NAMESPACE={name}", "-c"]
    glue = compile_to(FOLDER / f"{name}.{mark}.o", [*named, GLUE / "routing.cpp"])
    libraries = [flag for path in library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    libraries += ["-Wl,-Bsymbolic", "-lc10", "-ltorch_cpu", "-ltorch"]
    library = compile_to(FOLDER / f"{name}.{mark}.so", ["-shared", glue, *objects, *libraries])
    torch.ops.load_library(str(library))
    return getattr(torch.ops, name)


@pytest.fixture(scope="module")
def emulated() -> Ops:
    """The operators as they stand."""
    return load_operators("moetrain_routing")


def require_same(name: str, got: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for i, (mine, other) in enumerate(zip(got, wanted, strict=True)):
        assert mine.dtype == other.dtype, f"{name} {i}"
        assert torch.equal(mine, other), f"{name} {i} differs"


def make_part(seed: int, num_tokens: int, num_experts: int, dtype: torch.dtype) -> tuple[Any, ...]:
    """(score, token, offset, gid, valid) of a rank; rows of scores have gaps."""
    random = torch.Generator().manual_seed(seed)
    logits_TE = torch.randn(num_tokens, num_experts + 5, generator=random, dtype=dtype)
    score_TE = logits_TE.softmax(-1)[:, :num_experts]
    valid_T = torch.rand(num_tokens, generator=random) < 0.8
    routed = route(logits_TE[:, :num_experts], 2, valid_T=valid_T)
    gid_T2 = torch.stack((torch.full((num_tokens,), seed), torch.randperm(num_tokens, generator=random)), 1)
    return score_TE, routed.token_N, routed.offset_E1, gid_T2, valid_T


def require_rounding(emulated: Ops, dtype: torch.dtype = torch.float32) -> None:
    """Offers and rounded lists have the bits of the CPU's operators."""
    parts = [make_part(seed, 300, 11, dtype) for seed in (1, 2, 3)]
    offers = [emulated.offer_pairs(*part, 16) for part in parts]
    for part, offer in zip(parts, offers, strict=True):
        require_same("offers", offer, OPS.offer_pairs(*part, 16))
    offers_WEX = torch.stack([offer[0] for offer in offers])
    holder_WE = torch.tensor([[0], [4], [0]], dtype=torch.int32).repeat(1, 11)
    for rule in RULES:
        for holders in (None, holder_WE):
            rest = (offers_WEX, offers[1][1], holders, 1, 16, rule, 2**63 - 9)
            require_same("rounded", emulated.round_pairs(*parts[1][:3], *rest), OPS.round_pairs(*parts[1][:3], *rest))


def require_route(emulated: Ops, dtype: torch.dtype = torch.float32) -> None:
    """Choices have the bits of the CPU's operator, what is summed over all experts nearly so."""
    random = torch.Generator().manual_seed(0)
    logits_TE = torch.randn(70, 29, generator=random).to(dtype)[:, :24]
    valid_T = torch.rand(70, generator=random) < 0.8
    segment_T = torch.randint(3, (70,), generator=random).int()
    options = (3, 1, 1, "max", True, 1.5, valid_T, segment_T, 3)
    got, wanted = (ops.route(logits_TE, 4, "softmax", None, *options) for ops in (emulated, OPS))
    for name, i in {"token": 0, "offset": 2, "choices": 3, "places": 4, "counts": 6, "bad": 7}.items():
        require_same(name, (got[i],), (wanted[i],))
    torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(got[5], wanted[5], rtol=1e-6, atol=1e-6)
    dweight_N = torch.randn(wanted[1].shape, generator=random).to(wanted[1])
    dweight_N[int(wanted[2][-1]) :] = torch.nan
    dprob_GE = torch.randn(wanted[5].shape, generator=random).to(wanted[5])
    saved = (dweight_N, dprob_GE, logits_TE, wanted[3], wanted[4], "softmax", 3, True, 1.5, valid_T, segment_T)
    mine_TE, other_TE = (ops.route_backward(*saved) for ops in (emulated, OPS))
    relative = 1e-2 if dtype == torch.bfloat16 else 1e-5
    assert torch.allclose(mine_TE.double(), other_TE.double(), rtol=relative, atol=1e-6), "gradient"


def require_seats(emulated: Ops, num_tokens: int = 300) -> None:
    """Each seat's pairs are the CPU's operator's."""
    for seed in (3, 4):
        case = case_of(seed, num_tokens, num_experts=12, top_k=5, num_groups=9, domain_size=4, tail=7)
        lists, o = case.listed, case.options
        given = (*lists[:2], o["num_tokens"], *lists[2:], o["num_groups"], o["source"], o["domain_size"])
        require_same("seats", emulated.assign_seats(*given), OPS.assign_seats(*given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding(emulated: Ops, dtype: torch.dtype) -> None:
    require_rounding(emulated, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_route(emulated: Ops, dtype: torch.dtype) -> None:
    require_route(emulated, dtype)


@pytest.mark.parametrize("num_tokens", [0, 300])
def test_seats(emulated: Ops, num_tokens: int) -> None:
    require_seats(emulated, num_tokens)


def test_no_tokens(emulated: Ops) -> None:
    part = make_part(1, 0, 5, torch.float32)
    offers = emulated.offer_pairs(*part, 8)
    require_same("offers", offers, OPS.offer_pairs(*part, 8))
    rounded = emulated.round_pairs(*part[:3], offers[0][None], offers[1], None, 0, 8, "up", 0)
    assert [len(x) for x in rounded] == [0, 0, 6, 5, 5]
    assert not any(x.any() for x in rounded)


def test_values_are_checked_with_debugging_on(emulated: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    score_TE, token_N, offset_E1, gid_T2, valid_T = make_part(1, 40, 5, torch.float32)
    offers = offer_pairs(score_TE, token_N, offset_E1, gid_T2, 8, valid_T=valid_T)
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    emulated.offer_pairs(score_TE, token_N, offset_E1, gid_T2, valid_T, 8)
    with pytest.raises(ValueError, match=r"offer_pairs: tokens of each expert must ascend strictly"):
        emulated.offer_pairs(score_TE, token_N.flip(0), offset_E1, gid_T2, valid_T, 8)
    rest = (offers.offers_EX[None], offers.token_E2M, None, 0, 8, "up", 0)
    emulated.round_pairs(score_TE, token_N, offset_E1, *rest)
    with pytest.raises(ValueError, match=r"each token must have the score that it was offered with"):
        emulated.round_pairs(score_TE + 1, token_N, offset_E1, *rest)
    routed = route(score_TE, 2)
    with pytest.raises(ValueError, match=r"route_backward: places must be in \[0, 80\)"):
        emulated.route_backward(
            *(routed.weight_N, routed.prob_sum_GE, score_TE, routed.expert_id_TK, routed.place_TK + 80),
            *("softmax", 0, True, 1.0, None, None),
        )


def test_seats_are_checked_with_debugging_on(emulated: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    token_N, offset_E1, holder_Z = (torch.tensor(x, dtype=torch.int32) for x in ([0, 1], [0, 2], [0]))
    given = (offset_E1, 2, torch.tensor([0, 1], dtype=torch.int32), holder_Z, holder_Z + 1, 2, 0, 1)
    monkeypatch.setenv("MOETRAIN_DEBUG", "1")
    emulated.assign_seats(token_N, *given)
    with pytest.raises(ValueError, match=r"assign_seats: tokens must be below num_tokens and ascend inside an expert"):
        emulated.assign_seats(token_N.flip(0), *given)


def test_more_seats_than_can_be_grouped_are_refused(emulated: Ops) -> None:
    token_N, offset_E1 = torch.zeros(0, dtype=torch.int32), torch.zeros(2, dtype=torch.int32)
    seats = (torch.tensor([0, 12001], dtype=torch.int32), *2 * [torch.arange(12001, dtype=torch.int32)])
    with pytest.raises(ValueError, match="assign_seats: there must be at most 12000 seats on CUDA, got 12001; move"):
        emulated.assign_seats(token_N, offset_E1, 5, *seats, 12001, 0, 1)


def test_a_tile_too_large_for_shared_memory_is_refused(emulated: Ops) -> None:
    with pytest.raises(ValueError, match=r"offer_pairs: tile must be at most 1024 on CUDA, got 1025; move the tensors"):
        emulated.offer_pairs(*make_part(1, 4, 5, torch.float32), 1025)


@pytest.mark.parametrize("mutant_idx", range(len(MUTANTS)))
def test_a_broken_operator_is_noticed(mutant_idx: int) -> None:
    file, old, new, symptom = MUTANTS[mutant_idx]
    text = Path(CSRC / "ops" / file).read_text()
    assert old in text, f"the text to replace is not in {file}: {old}"
    broken = load_operators(f"moetrain_broken_routing_{mutant_idx}", (file, text.replace(old, new)))
    require: dict[str, Callable[[Ops], None]] = {
        "seats": require_seats,
        "token": require_route,
        "gradient": require_route,
    }
    with pytest.raises(AssertionError, match=symptom):
        require.get(symptom, require_rounding)(broken)
