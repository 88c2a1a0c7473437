#include <algorithm>
#include <vector>

#include "cpu/routing/assign_seats.h"
#include "cpu/routing/group_pairs.h"
#include "ops/common/tensors.h"
#include "ops/routing/assign_seats.h"

namespace moetrain {

std::tuple<at::Tensor, at::Tensor> assign_seats_cpu(const at::Tensor& token_N, const at::Tensor& offset_E1,
                                                    int64_t num_tokens, const SeatList& seats, const SeatSource& from) {
    check_assign_seats(token_N, offset_E1, num_tokens, seats, from);
    const int64_t num_pairs = token_N.size(0), num_seats = seats.holder_Z.size(0);
    const SeatProblem problem{.token = token_N.const_data_ptr<int32_t>(),
                              .offset = offset_E1.const_data_ptr<int32_t>(),
                              .seat_offset = seats.offset_E1.const_data_ptr<int32_t>(),
                              .holder = seats.holder_Z.const_data_ptr<int32_t>(),
                              .share = seats.share_Z.const_data_ptr<int32_t>(),
                              .num_experts = offset_E1.size(0) - 1,
                              .num_tokens = num_tokens,
                              .num_groups = from.num_groups,
                              .source = from.source,
                              .domain_size = from.domain_size};
    const SeatFault fault = first_seat_fault(problem, num_pairs, num_seats);
    TORCH_CHECK_VALUE(fault.must == nullptr, "assign_seats: ", fault.must, ", got ", fault.got, " at expert ",
                      fault.expert, "; give a Routing's pairs and a Placement's seats");

    std::vector<int32_t> seat(num_pairs, -1);
    assign_seats_kernel(problem, seat.data());
    auto pair_N = new_empty_like(token_N);
    auto offset_Z1 = new_empty({num_seats + 1}, token_N.options());
    group_pairs_kernel(seat.data(), num_pairs, num_seats, pair_N.mutable_data_ptr<int32_t>(),
                       offset_Z1.mutable_data_ptr<int32_t>());
    return {pair_N, offset_Z1};
}

}  // namespace moetrain
