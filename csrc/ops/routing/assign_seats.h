// Contract of assign_seats: each (token, expert) pair gets one of the expert's seats, a token's pairs few holders.
#pragma once
#include <algorithm>
#include <tuple>

#include "common/assign_seats_math.h"
#include "ops/common/fields.h"
#include "ops/rows/plan_rows.h"

namespace moetrain {

// Seats of all experts, ascending by (expert, holder), and what share of this source's pairs each is for.
struct SeatList {
    at::Tensor offset_E1;
    at::Tensor holder_Z;
    at::Tensor share_Z;

    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor>;
};

// Where the tokens are: group `source` of `num_groups`, of which `domain_size` at a time are near one another.
struct SeatSource {
    int64_t num_groups;
    int64_t source;
    int64_t domain_size;

    using Fields = FieldTypes<int64_t, int64_t, int64_t>;
};

inline void check_assign_seats(const at::Tensor& token_N, const at::Tensor& offset_E1, int64_t num_tokens,
                               const SeatList& seats, const SeatSource& from) {
    constexpr auto op = "assign_seats";
    check_index_list(op, "token", token_N);
    check_index_list(op, "offset", offset_E1);
    check_index_list(op, "seat_offset", seats.offset_E1);
    check_index_list(op, "holder", seats.holder_Z);
    check_index_list(op, "share", seats.share_Z);
    TORCH_CHECK_VALUE(offset_E1.size(0) >= 1, op, ": offset must be [E + 1], got [0]; give 0 alone for no experts");
    check_sizes(op, "seat_offset", seats.offset_E1, {offset_E1.size(0)}, "[E + 1]");
    check_sizes(op, "share", seats.share_Z, {seats.holder_Z.size(0)}, "[Z]");
    for (const at::Tensor* list : {&offset_E1, &seats.offset_E1, &seats.holder_Z, &seats.share_Z})
        check_same_device(op, "a list", *list, "token", token_N);
    check_fits_int32(op, "the number of pairs", token_N.size(0));
    TORCH_CHECK_VALUE(num_tokens >= 0 && num_tokens <= kMaxSeatTokens, op, ": num_tokens must be between 0 and ",
                      kMaxSeatTokens, ", got ", num_tokens);
    const auto& [num_groups, source, domain_size] = from;
    TORCH_CHECK_VALUE(num_groups >= 1 && source >= 0 && source < num_groups && domain_size >= 1, op,
                      ": num_groups and domain_size must be at least 1 and source a group below num_groups, got ",
                      num_groups, ", ", domain_size, " and ", source);
    check_fits_int32(op, "num_groups", num_groups);
}

// The values that this points to are not looked at.
inline SeatProblem seat_problem(const at::Tensor& token_N, const at::Tensor& offset_E1, int64_t num_tokens,
                                const SeatList& seats, const SeatSource& from) {
    const int64_t near_begin = from.source - from.source % from.domain_size;
    return {.token = token_N.const_data_ptr<int32_t>(),
            .offset = offset_E1.const_data_ptr<int32_t>(),
            .seat_offset = seats.offset_E1.const_data_ptr<int32_t>(),
            .holder = seats.holder_Z.const_data_ptr<int32_t>(),
            .share = seats.share_Z.const_data_ptr<int32_t>(),
            .num_experts = offset_E1.size(0) - 1,
            .num_tokens = num_tokens,
            .num_groups = from.num_groups,
            .source = from.source,
            .near_begin = near_begin,
            .near_end = near_begin + std::min(from.domain_size, from.num_groups - near_begin)};
}

// Refuses lists on the CPU that break a promise of their values.
void check_seat_values(const at::Tensor& token_N, const at::Tensor& offset_E1, int64_t num_tokens,
                       const SeatList& seats, const SeatSource& from);

// (pair_N, offset_Z1): pair_N[offset_Z1[z] : offset_Z1[z + 1]] are the places in the list of the pairs of seat z,
// ascending; places beyond the pairs follow offset_Z1[Z].
std::tuple<at::Tensor, at::Tensor> assign_seats_cpu(const at::Tensor& token_N, const at::Tensor& offset_E1,
                                                    int64_t num_tokens, const SeatList& seats, const SeatSource& from);
std::tuple<at::Tensor, at::Tensor> assign_seats_cuda(const at::Tensor& token_N, const at::Tensor& offset_E1,
                                                     int64_t num_tokens, const SeatList& seats, const SeatSource& from);

}  // namespace moetrain
