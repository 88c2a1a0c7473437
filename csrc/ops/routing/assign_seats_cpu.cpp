#include <vector>

#include "cpu/routing/assign_seats.h"
#include "cpu/routing/group_pairs.h"
#include "ops/common/tensors.h"
#include "ops/routing/assign_seats.h"

namespace moetrain {

void check_seat_values(const at::Tensor& token_N, const at::Tensor& offset_E1, int64_t num_tokens,
                       const SeatList& seats, const SeatSource& from) {
    const SeatProblem problem = seat_problem(token_N, offset_E1, num_tokens, seats, from);
    const SeatFault fault = first_seat_fault(problem, token_N.size(0), seats.holder_Z.size(0));
    TORCH_CHECK_VALUE(fault.must == nullptr, "assign_seats: ", fault.must, ", got ", fault.got, " at expert ",
                      fault.expert, "; give a Routing's pairs and a Placement's seats");
}

std::tuple<at::Tensor, at::Tensor> assign_seats_cpu(const at::Tensor& token_N, const at::Tensor& offset_E1,
                                                    int64_t num_tokens, const SeatList& seats, const SeatSource& from) {
    check_assign_seats(token_N, offset_E1, num_tokens, seats, from);
    check_seat_values(token_N, offset_E1, num_tokens, seats, from);
    const int64_t num_pairs = token_N.size(0), num_seats = seats.holder_Z.size(0);
    std::vector<int32_t> seat(num_pairs, -1);
    assign_seats_kernel(seat_problem(token_N, offset_E1, num_tokens, seats, from), seat.data());
    auto pair_N = new_empty_like(token_N);
    auto offset_Z1 = new_empty({num_seats + 1}, token_N.options());
    group_pairs_kernel(seat.data(), num_pairs, num_seats, pair_N.mutable_data_ptr<int32_t>(),
                       offset_Z1.mutable_data_ptr<int32_t>());
    return {pair_N, offset_Z1};
}

}  // namespace moetrain
