// With debugging on, the CPU checks copies of what comes in, which waits for the device.
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "cuda/routing/assign_seats.h"
#include "cuda/routing/group_pairs.h"
#include "ops/common/boxed.h"
#include "ops/common/cuda.h"
#include "ops/routing/assign_seats.h"

namespace moetrain {

std::tuple<at::Tensor, at::Tensor> assign_seats_cuda(const at::Tensor& token_N, const at::Tensor& offset_E1,
                                                     int64_t num_tokens, const SeatList& seats,
                                                     const SeatSource& from) {
    check_assign_seats(token_N, offset_E1, num_tokens, seats, from);
    const int64_t num_pairs = token_N.size(0), num_seats = seats.holder_Z.size(0);
    TORCH_CHECK_VALUE(num_seats <= kMaxExpertsToGroup, "assign_seats: there must be at most ", kMaxExpertsToGroup,
                      " seats on CUDA, got ", num_seats, "; move the tensors to the CPU");
    const c10::cuda::CUDAGuard guard(token_N.device());
    if (debug_checks()) {
        const SeatList on_cpu{seats.offset_E1.cpu(), seats.holder_Z.cpu(), seats.share_Z.cpu()};
        check_seat_values(token_N.cpu(), offset_E1.cpu(), num_tokens, on_cpu, from);
    }
    const SeatProblem problem = seat_problem(token_N, offset_E1, num_tokens, seats, from);
    const auto stream = c10::cuda::getCurrentCUDAStream();
    const auto seat_N = at::empty({num_pairs}, token_N.options());
    const auto scratch = at::empty({assign_seats_scratch_size(problem, num_seats)}, token_N.options());
    C10_CUDA_CHECK(launch_assign_seats(problem, num_pairs, num_seats, seat_N.mutable_data_ptr<int32_t>(),
                                       scratch.mutable_data_ptr<int32_t>(), stream));
    auto pair_N = at::empty({num_pairs}, token_N.options());
    auto offset_Z1 = at::empty({num_seats + 1}, token_N.options());
    const auto to_group = at::empty({group_pairs_scratch_size(num_pairs, num_seats)}, token_N.options());
    C10_CUDA_CHECK(launch_group_pairs(seat_N.const_data_ptr<int32_t>(), num_pairs, num_seats,
                                      pair_N.mutable_data_ptr<int32_t>(), offset_Z1.mutable_data_ptr<int32_t>(),
                                      to_group.mutable_data_ptr<int32_t>(), nullptr, stream));
    return {pair_N, offset_Z1};
}

TORCH_LIBRARY_IMPL(moetrain, CUDA, m) { m.impl("assign_seats", boxed::kernel<&assign_seats_cuda>()); }

}  // namespace moetrain
