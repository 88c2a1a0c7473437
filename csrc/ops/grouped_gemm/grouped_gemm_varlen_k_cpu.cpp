#include <ATen/core/LegacyTypeDispatch.h>

#include <algorithm>
#include <vector>

#include "cpu/common/tasks.h"
#include "cpu/rows/gather_rows.h"
#include "ops/common/tensors.h"
#include "ops/grouped_gemm/grouped_gemm_varlen_k.h"

namespace moetrain {
namespace {

// Few slots are cut along I so that they feed more threads, but not into blocks of fewer than so many rows of out.
constexpr int64_t kFewSlots = 8;
constexpr int64_t kRowsPerBlock = 64;

// The groups of each slot, ascending.
std::vector<std::vector<int64_t>> groups_of_slots(const VarlenK& in, int64_t num_slots) {
    std::vector<std::vector<int64_t>> groups(num_slots);
    const auto* offset = in.offset_E1.const_data_ptr<int32_t>();
    for (int64_t e = 0; e + 1 < in.offset_E1.size(0); ++e) {
        if (offset[e] == offset[e + 1]) continue;
        groups[in.slot_E ? in.slot_E->const_data_ptr<int32_t>()[e] : e].push_back(e);
    }
    return groups;
}

// One operand's rows of one slot, in order: a view where they lie together, else a copy. All of a slot's rows go into
// one product, so that the sum over groups is kept in the GEMM's own accumulator whatever the dtype.
at::Tensor rows_of_groups(const at::Tensor& x, const OptionalTensor& row, const at::Tensor& offset_E1,
                          const std::vector<int64_t>& groups) {
    const auto* offset = offset_E1.const_data_ptr<int32_t>();
    if (!row && groups.size() == 1) return x.narrow(0, offset[groups[0]], offset[groups[0] + 1] - offset[groups[0]]);

    int64_t num_rows = 0;
    for (const int64_t e : groups)
        num_rows += offset[e + 1] - offset[e];
    auto out = new_empty({num_rows, x.size(1)}, x.options());
    const auto elem_bytes = static_cast<int64_t>(x.element_size());
    int64_t rows_done = 0;
    for (const int64_t e : groups) {
        const int64_t rows_here = offset[e + 1] - offset[e];
        auto to = out.narrow(0, rows_done, rows_here);
        if (row) {
            copy_rows(x.const_data_ptr(), row_stride(x) * elem_bytes, row->const_data_ptr<int32_t>() + offset[e],
                      rows_here, to.mutable_data_ptr(), x.size(1) * elem_bytes);
        } else {
            to.copy_(x.narrow(0, offset[e], rows_here));
        }
        rows_done += rows_here;
    }
    return out;
}

void multiply_slots(const VarlenK& in, const at::Tensor& out_SIJ, bool accumulate) {
    const int64_t num_slots = out_SIJ.size(0);
    const int64_t num_rows = out_SIJ.size(1);
    const auto groups = groups_of_slots(in, num_slots);
    const int64_t num_blocks = num_slots >= kFewSlots ? 1 : std::clamp<int64_t>(num_rows / kRowsPerBlock, 1, kFewSlots);
    run_tasks(num_slots * num_blocks, [&] {
        return [&](int64_t task) {
            const at::AutoDispatchBelowADInplaceOrView guard;  // a worker thread does not inherit the caller's
            const int64_t slot = task / num_blocks;
            const int64_t begin = task % num_blocks * num_rows / num_blocks;
            const int64_t size = (task % num_blocks + 1) * num_rows / num_blocks - begin;
            auto out = out_SIJ.select(0, slot).narrow(0, begin, size);
            if (groups[slot].empty()) {
                if (!accumulate) out.zero_();
                return;
            }
            auto a = rows_of_groups(in.a_MI.narrow(1, begin, size), in.row_a_M, in.offset_E1, groups[slot]);
            auto b = rows_of_groups(in.b_MJ, in.row_b_M, in.offset_E1, groups[slot]);
            if (out.scalar_type() != a.scalar_type()) {  // an fp32 sum of bf16 rows: no GEMM of ATen's mixes the two
                a = a.to(out.scalar_type());
                b = b.to(out.scalar_type());
            }
            if (accumulate) {
                out.addmm_(a.t(), b);
            } else {
                multiply_into(out, a.t(), b);
            }
        };
    });
}

}  // namespace

at::Tensor grouped_gemm_varlen_k_cpu(const VarlenK& in, int64_t num_slots) {
    check_varlen_k(in, num_slots);
    check_varlen_k_values(in, num_slots);
    auto out_SIJ = new_empty({num_slots, in.a_MI.size(1), in.b_MJ.size(1)}, in.a_MI.options());
    multiply_slots(in, out_SIJ, /*accumulate=*/false);
    return out_SIJ;
}

void grouped_gemm_varlen_k_accumulate_cpu(at::Tensor& out_SIJ, const VarlenK& in) {
    check_varlen_k_out(out_SIJ, in);
    check_varlen_k_values(in, out_SIJ.size(0));
    multiply_slots(in, out_SIJ, /*accumulate=*/true);
}

}  // namespace moetrain
