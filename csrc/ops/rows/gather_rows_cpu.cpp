#include <ATen/Parallel.h>

#include "cpu/rows/gather_rows.h"
#include "ops/common/tensors.h"
#include "ops/rows/gather_rows.h"

namespace moetrain {
namespace {

constexpr int64_t kBytesPerTask = 1 << 16;  // below this a second thread costs more than it copies

}  // namespace

at::Tensor gather_rows_cpu(const at::Tensor& x_TD, const at::Tensor& row_N, const OptionalTensor& offset_E1) {
    check_gather_rows(x_TD, row_N, offset_E1);
    const int64_t length = check_gather_rows_values(row_N, offset_E1, x_TD.size(0));
    auto y_ND = new_empty({row_N.size(0), x_TD.size(1)}, x_TD.options());

    const auto elem_bytes = static_cast<int64_t>(x_TD.element_size());
    const int64_t row_bytes = x_TD.size(1) * elem_bytes;
    if (length == 0 || row_bytes == 0) return y_ND;
    const auto* row = row_N.const_data_ptr<int32_t>();
    auto* y = static_cast<char*>(y_ND.mutable_data_ptr());
    at::parallel_for(0, length, std::max<int64_t>(1, kBytesPerTask / row_bytes), [&](int64_t begin, int64_t end) {
        copy_rows(x_TD.const_data_ptr(), row_stride(x_TD) * elem_bytes, row + begin, end - begin, y + begin * row_bytes,
                  row_bytes);
    });
    return y_ND;
}

}  // namespace moetrain
