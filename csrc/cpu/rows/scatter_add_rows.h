#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>

namespace moetrain {

// x[t, :] = sum over i in [start[t], start[t + 1]) of weight[pair[i]] * y[pair[i], :], in that order.
template <typename Sum, typename Value>
struct RowSums {
    const Value* y;
    int64_t y_stride;      // elements from one row to the next
    const Sum* weight;     // null: all ones
    const int32_t* start;  // [rows of x + 1]
    const int32_t* pair;
    int64_t width;
    Value* x;  // contiguous
};

// The rows t in [begin, end). `scratch` holds `width` sums. Defined for (float, bf16), (float, fp16), (float, float),
// (double, double).
template <typename Sum, typename Value>
void sum_rows(const RowSums<Sum, Value>& rows, int64_t begin, int64_t end, Sum* scratch);

}  // namespace moetrain
