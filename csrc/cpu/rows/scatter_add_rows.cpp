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
void sum_rows(const Value* y, int64_t y_stride, const Sum* weight, const int32_t* start, const int32_t* pair,
              int64_t begin, int64_t end, int64_t width, Sum* scratch, Value* x) {
    for (int64_t t = begin; t < end; ++t) {
        std::fill_n(scratch, width, Sum(0));
        for (int32_t i = start[t]; i < start[t + 1]; ++i) {
            const int64_t n = pair[i];
            add_scaled(scratch, y + n * y_stride, weight == nullptr ? Sum(1) : weight[n], width);
        }
        round_row(scratch, width, x + t * width);
    }
}

template void sum_rows(const double*, int64_t, const double*, const int32_t*, const int32_t*, int64_t, int64_t, int64_t,
                       double*, double*);
template void sum_rows(const float*, int64_t, const float*, const int32_t*, const int32_t*, int64_t, int64_t, int64_t,
                       float*, float*);
template void sum_rows(const c10::BFloat16*, int64_t, const float*, const int32_t*, const int32_t*, int64_t, int64_t,
                       int64_t, float*, c10::BFloat16*);
template void sum_rows(const c10::Half*, int64_t, const float*, const int32_t*, const int32_t*, int64_t, int64_t,
                       int64_t, float*, c10::Half*);

}  // namespace moetrain
