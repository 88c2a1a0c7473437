#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace moetrain {

// x[t, :] = sum over i in [start[t], start[t + 1]) of weight[pair[i]] * y[pair[i], :], in that order, for t in
// [begin, end). `weight` may be null (all ones); `scratch` holds `width` sums. x is contiguous, y's rows are
// `y_stride` elements apart. Defined for (float, bf16), (float, fp16), (float, float), (double, double).
template <typename Sum, typename Value>
void sum_rows(const Value* y, int64_t y_stride, const Sum* weight, const int32_t* start, const int32_t* pair,
              int64_t begin, int64_t end, int64_t width, Sum* scratch, Value* x);

}  // namespace moetrain
