"""Breaks the kernels that assign seats, one way at a time, and requires the emulated test to notice each."""

from pathlib import Path

import pytest
from emulated_kernels import Mutant, mutant_params, require_caught, source_of

SEATS = "routing/assign_seats.cu"
WRONG = r"seat\[|ended by signal|deadlock"

MUTANTS = [
    Mutant("a lane's shares alone", SEATS, "total = warp_sum(total);", "", WRONG),
    Mutant("bounds of the seats before", SEATS, "before + sum, total", "before, total", WRONG),
    Mutant("shares of 32 seats alone", SEATS, "before += __shfl_sync", "before = __shfl_sync", WRONG),
    Mutant("a turn for all experts", SEATS, "seat_turn(in.source, e)", "seat_turn(in.source, 0)", WRONG),
    Mutant("a turn for all sources", SEATS, "seat_turn(in.source, e)", "seat_turn(0, e)", WRONG),
    Mutant("blocks that begin a token late", SEATS, "num_pairs, block * kSeatBlock)", "num_pairs, block * 257)", WRONG),
    Mutant("the first seat's bound counted past", SEATS, "num_seats, place + 1)", "num_seats, place)", WRONG),
    Mutant("pairs stand where they lie", SEATS, "(i - list) * stride % num_pairs", "i - list", WRONG),
    Mutant("places counted from all lists' start", SEATS, "(i - list) * stride", "i * stride", WRONG),
    Mutant("the first expert of a word alone", SEATS, "1U << (e % kWordBits)", "1U", WRONG),
    Mutant("one word for all experts", SEATS, "token * num_words + e / kWordBits", "token * num_words", WRONG),
    Mutant("closed seats listed", SEATS, "if (at.quota_Z[z] == 0) continue;", "", WRONG),
    Mutant("entries of another token kept", SEATS, "if (lane == 0) *at.num_entries = 0;", "", WRONG),
    Mutant(
        "listed before the list is cleared",
        SEATS,
        "*at.num_entries = 0;\n        __syncwarp();",
        "*at.num_entries = 0;",
        WRONG,
    ),
    Mutant("choices of another token kept", SEATS, "            at.choice_E[e] = INT32_MAX;\n", "", WRONG),
    Mutant("hits are not counted", SEATS, "atomicAdd(at.hits_G + holder, 1);", "at.hits_G[holder] = 1;", WRONG),
    Mutant("hits stay", SEATS, "atomicAdd(at.hits_G + at.entry_holder_Z[i], -1);", "", WRONG),
    Mutant("hits of what is served alone stay", SEATS, "            at.hits_G[holder] = 0;\n", "", WRONG),
    Mutant("entries stay", SEATS, "            at.entry_seat_Z[i] = kGone;\n", "", WRONG),
    Mutant("served by any token", SEATS, "static_cast<int32_t>(token + 1)", "1", WRONG),
    Mutant("quotas stay", SEATS, "        --at.quota_Z[z];\n", "", WRONG),
    Mutant("every pair of an expert the first", SEATS, "at.next_E[e]++", "at.next_E[e]", WRONG),
    Mutant("the first 32 entries alone", SEATS, "i < num_entries;", "i < min(num_entries, kWarpSize);", WRONG),
    Mutant("home is not first", SEATS, "static_cast<int32_t>(in.source)}", "0}", WRONG),
    Mutant("the nearest of nobody", SEATS, "in.is_near(holder), holder}", "false, holder}", WRONG),
    Mutant(
        "the higher of equal groups",
        SEATS,
        "__reduce_min_sync(kWholeWarp, best.rank() == rank ? best.holder : INT32_MAX)",
        "__reduce_max_sync(kWholeWarp, best.rank() == rank ? best.holder : kGone)",
        WRONG,
    ),
    Mutant("any lane's group", SEATS, "best.rank() == rank ? best.holder : INT32_MAX", "best.holder", WRONG),
    Mutant("far ones served as near", SEATS, "in.is_near(holder) ? holder + INT32_MIN : holder", "holder", WRONG),
    Mutant("alone too early", SEATS, "best.hits > 1;", "best.hits > 2;", WRONG),
    Mutant(
        "the last are never served", SEATS, "if (best.hits == 1) seat_alone", "if (best.hits == 2) seat_alone", WRONG
    ),
    Mutant(
        "a block of tokens begins with what the one before has left",
        SEATS,
        "            memory[i] = 0;\n",
        "            if (block < 3) memory[i] = 0;\n",
        WRONG,
    ),
    Mutant(
        "served before all is collected",
        SEATS,
        "collect(in, by, at, block);\n        __syncthreads();",
        "collect(in, by, at, block);",
        WRONG,
    ),
    Mutant(
        "collected before all is cleared", SEATS, "memory[i] = 0;\n        __syncthreads();", "memory[i] = 0;", WRONG
    ),
    Mutant("cleared before all are served", SEATS, "        __syncthreads();\n    }\n}", "    }\n}", WRONG),
    Mutant("memory over what divides", SEATS, "scratch + division_size(in, num_seats);", "scratch;", WRONG),
    Mutant("the tail has seats", SEATS, "cudaMemsetAsync(seat, 0xff", "cudaMemsetAsync(seat, 0", WRONG),
]


def test_every_mutant_finds_its_text() -> None:
    gone = [mutant.name for mutant in MUTANTS if mutant.old not in source_of(mutant).read_text()]
    assert not gone, f"these mutants name text that is no longer there: {gone}"


@pytest.mark.parametrize("mutant", mutant_params(MUTANTS))
def test_mutant_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    require_caught("assign_seats", mutant, tmp_path)
