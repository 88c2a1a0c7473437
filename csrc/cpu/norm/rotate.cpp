#include "cpu/norm/rotate.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "cpu/common/rows.h"

namespace moetrain {
namespace {

constexpr int64_t kRotatedPerTask = 1 << 14;  // below this a second thread costs more than it adds

// Tokens [begin, end) of all rows, one after another.
template <typename Acc>
MOETRAIN_INLINE void turn(const Rotation<Acc>& io, int64_t begin, int64_t end) {
    const int64_t half = io.head_dim / 2;
    std::vector<Acc> buffer(5 * half);
    Acc* first = buffer.data();
    Acc* second = first + half;
    Acc* turned = first + 2 * half;
    Acc* sin = first + 4 * half;
    for (int64_t token = begin; token < end; ++token) {
        const Acc* cos = io.cos + token * half;
        for (int64_t i = 0; i < half; ++i)
            sin[i] = io.inverse ? -io.sin[token * half + i] : io.sin[token * half + i];
        const int64_t from = token / io.length * io.batch_stride + token % io.length * io.token_stride;
        for (int64_t head = 0; head < io.num_heads; ++head) {
            load_row(io.x, io.dtype, from + head * io.head_stride, io.head_dim, first);
            for (int64_t i = 0; i < half; ++i) {
                turned[i] = first[i] * cos[i] - second[i] * sin[i];
                turned[half + i] = second[i] * cos[i] + first[i] * sin[i];
            }
            store_row(turned, io.head_dim, io.y, io.dtype, (token * io.num_heads + head) * io.head_dim);
        }
    }
}

// The functions that exist once per instruction set: templates cannot be cloned. Doubles need not be fast.
MOETRAIN_CLONES void run(const Rotation<float>& io, int64_t begin, int64_t end) { turn(io, begin, end); }
void run(const Rotation<double>& io, int64_t begin, int64_t end) { turn(io, begin, end); }

}  // namespace

template <typename Acc>
void rotate_kernel(const Rotation<Acc>& io) {
    const int64_t per_token = std::max<int64_t>(1, io.num_heads * io.head_dim);
    at::parallel_for(0, io.num_batch * io.length, std::max<int64_t>(1, kRotatedPerTask / per_token),
                     [&](int64_t begin, int64_t end) { run(io, begin, end); });
}

template void rotate_kernel(const Rotation<float>&);
template void rotate_kernel(const Rotation<double>&);

}  // namespace moetrain
