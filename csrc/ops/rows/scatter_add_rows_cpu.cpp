#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <vector>

#include "cpu/rows/scatter_add_rows.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/rows/scatter_add_rows.h"

namespace moetrain {
namespace {

constexpr int64_t kElementsPerTask = 1 << 14;  // below this a second thread costs more than it adds

// The pairs of each row, ascending: a stable counting sort of the list by row.
struct RowPairs {
    std::vector<int32_t> start;  // [num_rows + 1]
    std::vector<int32_t> pair;   // [length]
};

RowPairs group_by_row(const int32_t* row, int64_t length, int64_t num_rows) {
    RowPairs out{std::vector<int32_t>(num_rows + 1, 0), std::vector<int32_t>(length)};
    for (int64_t n = 0; n < length; ++n)
        ++out.start[row[n] + 1];
    for (int64_t t = 0; t < num_rows; ++t)
        out.start[t + 1] += out.start[t];
    std::vector<int32_t> next(out.start.begin(), out.start.end() - 1);
    for (int64_t n = 0; n < length; ++n)
        out.pair[next[row[n]]++] = static_cast<int32_t>(n);
    return out;
}

}  // namespace

at::Tensor scatter_add_rows_cpu(const at::Tensor& y_ND, const at::Tensor& row_N, const OptionalTensor& weight_N,
                                const OptionalTensor& offset_E1, int64_t num_rows) {
    check_scatter_add_rows(y_ND, row_N, weight_N, offset_E1, num_rows);
    const int64_t length = check_scatter_add_rows_values(row_N, offset_E1, num_rows);
    const int64_t width = y_ND.size(1);
    auto x_TD = new_empty({num_rows, width}, y_ND.options());
    if (x_TD.numel() == 0) return x_TD;

    const auto rows = group_by_row(row_N.const_data_ptr<int32_t>(), length, num_rows);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, y_ND.scalar_type(), "scatter_add_rows", [&] {
        using Sum = at::opmath_type<scalar_t>;
        const RowSums<Sum, scalar_t> sums{
            .y = y_ND.const_data_ptr<scalar_t>(),
            .y_stride = row_stride(y_ND),
            .weight = data_or_null<Sum>(weight_N),
            .start = rows.start.data(),
            .pair = rows.pair.data(),
            .width = width,
            .x = x_TD.mutable_data_ptr<scalar_t>(),
        };
        at::parallel_for(0, num_rows, std::max<int64_t>(1, kElementsPerTask / width), [&](int64_t begin, int64_t end) {
            std::vector<Sum> scratch(width);
            sum_rows(sums, begin, end, scratch.data());
        });
    });
    return x_TD;
}

}  // namespace moetrain
