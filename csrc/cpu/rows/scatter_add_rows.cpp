// The sum over a row's pairs: one thread owns a whole row, so its order, and with it every bit, is that of the list.
#include "cpu/rows/scatter_add_rows.h"

#include <algorithm>

#include "cpu/common/rows.h"

namespace moetrain {
namespace {

template <typename Sum, typename Value>
MOETRAIN_INLINE void add_row(Sum* sum, const Value* y, Sum weight, int64_t width) {
    for (int64_t d = 0; d < width; ++d)
        sum[d] += weight * static_cast<Sum>(y[d]);
}

MOETRAIN_CLONES void add_scaled(double* sum, const double* y, double weight, int64_t width) {
    add_row(sum, y, weight, width);
}
MOETRAIN_CLONES void round_row(const double* sum, int64_t width, double* x) { convert_row(sum, width, x); }

MOETRAIN_CLONES void add_scaled(float* sum, const float* y, float weight, int64_t width) {
    add_row(sum, y, weight, width);
}
MOETRAIN_CLONES void round_row(const float* sum, int64_t width, float* x) { convert_row(sum, width, x); }

MOETRAIN_CLONES void add_scaled(float* sum, const c10::BFloat16* y, float weight, int64_t width) {
    add_row(sum, y, weight, width);
}
MOETRAIN_CLONES void round_row(const float* sum, int64_t width, c10::BFloat16* x) { convert_row(sum, width, x); }

MOETRAIN_CLONES void add_scaled(float* sum, const c10::Half* y, float weight, int64_t width) {
    add_row(sum, y, weight, width);
}
MOETRAIN_CLONES void round_row(const float* sum, int64_t width, c10::Half* x) { convert_row(sum, width, x); }

}  // namespace

template <typename Sum, typename Value>
void sum_rows(const RowSums<Sum, Value>& rows, int64_t begin, int64_t end, Sum* scratch) {
    for (int64_t t = begin; t < end; ++t) {
        std::fill_n(scratch, rows.width, Sum(0));
        for (int32_t i = rows.start[t]; i < rows.start[t + 1]; ++i) {
            const int64_t n = rows.pair[i];
            add_scaled(scratch, rows.y + n * rows.y_stride, rows.weight == nullptr ? Sum(1) : rows.weight[n],
                       rows.width);
        }
        round_row(scratch, rows.width, rows.x + t * rows.width);
    }
}

template void sum_rows(const RowSums<double, double>&, int64_t, int64_t, double*);
template void sum_rows(const RowSums<float, float>&, int64_t, int64_t, float*);
template void sum_rows(const RowSums<float, c10::BFloat16>&, int64_t, int64_t, float*);
template void sum_rows(const RowSums<float, c10::Half>&, int64_t, int64_t, float*);

}  // namespace moetrain
