#include <ATen/core/LegacyTypeDispatch.h>

#include <vector>

#include "cpu/common/tasks.h"
#include "cpu/rows/gather_rows.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/grouped_gemm/grouped_gemm.h"

namespace moetrain {
namespace {

// Rows of one GEMM call: enough to pay for packing b, few enough that one large group still feeds every thread.
constexpr int64_t kRowsPerTask = 512;

struct Task {
    int64_t begin, num_rows, slot;
};

std::vector<Task> cut_tasks(const at::Tensor& offset_E1, const OptionalTensor& slot_E) {
    const auto* offset = offset_E1.const_data_ptr<int32_t>();
    const auto* slot = data_or_null<int32_t>(slot_E);
    std::vector<Task> tasks;
    for (int64_t e = 0; e + 1 < offset_E1.size(0); ++e) {
        for (int64_t begin = offset[e]; begin < offset[e + 1]; begin += kRowsPerTask) {
            tasks.push_back({.begin = begin,
                             .num_rows = std::min<int64_t>(kRowsPerTask, offset[e + 1] - begin),
                             .slot = slot == nullptr ? e : slot[e]});
        }
    }
    return tasks;
}

}  // namespace

at::Tensor grouped_gemm_cpu(const GroupedProduct& in) {
    check_grouped_gemm(in);
    check_grouped_gemm_values(in);
    const auto& [a_MK, b_SNK, offset_E1, slot_E, row_M, b_is_kn] = in;
    const int64_t inner = in.inner();
    const int64_t num_rows = in.capacity();
    auto c_MN = new_empty({num_rows, in.cols()}, a_MK.options());

    const auto tasks = cut_tasks(offset_E1, slot_E);
    const auto elem_bytes = static_cast<int64_t>(a_MK.element_size());
    run_tasks(static_cast<int64_t>(tasks.size()), [&] {
        const auto scratch =
            row_M ? new_empty({std::min(kRowsPerTask, num_rows), inner}, a_MK.options()) : at::Tensor();
        return [&, scratch](int64_t task_idx) {
            const at::AutoDispatchBelowADInplaceOrView guard;  // a worker thread does not inherit the caller's
            const auto& task = tasks[task_idx];
            auto a = row_M ? scratch.narrow(0, 0, task.num_rows) : a_MK.narrow(0, task.begin, task.num_rows);
            if (row_M) {
                copy_rows(a_MK.const_data_ptr(), row_stride(a_MK) * elem_bytes,
                          row_M->const_data_ptr<int32_t>() + task.begin, task.num_rows, a.mutable_data_ptr(),
                          inner * elem_bytes);
            }
            const auto b = b_SNK.select(0, task.slot);
            auto c = c_MN.narrow(0, task.begin, task.num_rows);
            multiply_into(c, a, b_is_kn ? b : b.t());
        };
    });
    return c_MN;
}

}  // namespace moetrain
