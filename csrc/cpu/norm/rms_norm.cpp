// Rows are read into a buffer of Acc, which stays in a level 1 cache: one conversion, then arithmetic in one type.
// The gradient of the weight is summed over chunks of rows, cut by sizes alone, and then over the chunks in order, so
// that no result depends on the number of threads.
#include "cpu/norm/rms_norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/common/rows.h"

namespace moetrain {
namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRowsPerChunk = 64;
constexpr int64_t kElementsPerTask = 1 << 14;  // below this a second thread costs more than it adds

// Sum of a[i] * b[i]: in every instruction set the same 16 running sums, added up in the same order.
template <typename Acc>
MOETRAIN_INLINE Acc dot(const Acc* a, const Acc* b, int64_t size) {
    typedef Acc Lanes __attribute__((vector_size(kLanes * sizeof(Acc))));
    Lanes sums = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes) {
        Lanes from_a, from_b;
        std::memcpy(&from_a, a + i, sizeof from_a);
        std::memcpy(&from_b, b + i, sizeof from_b);
        sums += from_a * from_b;
    }
    Acc lane[kLanes];
    std::memcpy(lane, &sums, sizeof lane);
    for (; i < size; ++i)
        lane[i % kLanes] += a[i] * b[i];
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
        for (int64_t j = 0; j < half; ++j)
            lane[j] += lane[j + half];
    }
    return lane[0];
}

template <typename Acc>
MOETRAIN_INLINE void normalise(const RmsNormForward<Acc>& io, int64_t begin, int64_t end) {
    const int64_t D = io.width;
    std::vector<Acc> buffer(D);
    Acc* row = buffer.data();
    const Acc* weight = io.weight_D;
    for (int64_t r = begin; r < end; ++r) {
        load_row(io.x_RD, io.dtype, r * D, D, row);
        const Acc inv_rms = Acc(1) / std::sqrt(dot(row, row, D) / static_cast<Acc>(D) + io.eps);
        for (int64_t d = 0; d < D; ++d)
            row[d] = row[d] * inv_rms * weight[d];
        store_row(row, D, io.y_RD, io.dtype, r * D);
        io.inv_rms_R[r] = inv_rms;
    }
}

// With n = x * inv_rms and g = dy * weight: dweight += dy * n, and dx = inv_rms * (g - n * mean(g * n)).
template <typename Acc>
MOETRAIN_INLINE void go_back(const RmsNormBackward<Acc>& io, Acc* dweight_CD, int64_t begin, int64_t end) {
    const int64_t D = io.width;
    std::vector<Acc> buffer(2 * D);
    Acc* n = buffer.data();
    Acc* g = n + D;
    const Acc* weight = io.weight_D;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
        Acc* dweight = dweight_CD + chunk * D;
        for (int64_t r = chunk * kRowsPerChunk; r < std::min((chunk + 1) * kRowsPerChunk, io.num_rows); ++r) {
            const Acc inv_rms = io.inv_rms_R[r];
            load_row(io.x_RD, io.dtype, r * D, D, n);
            load_row(io.dy_RD, io.dtype, r * D, D, g);
            for (int64_t d = 0; d < D; ++d) {
                n[d] *= inv_rms;
                dweight[d] += g[d] * n[d];
                g[d] *= weight[d];
            }
            const Acc along = dot(g, n, D) / static_cast<Acc>(D);
            for (int64_t d = 0; d < D; ++d)
                g[d] = inv_rms * (g[d] - n[d] * along);
            store_row(g, D, io.dx_RD, io.dtype, r * D);
        }
    }
}

// The functions that exist once per instruction set: templates cannot be cloned. Doubles need not be fast.
MOETRAIN_CLONES void run(const RmsNormForward<float>& io, int64_t begin, int64_t end) { normalise(io, begin, end); }
void run(const RmsNormForward<double>& io, int64_t begin, int64_t end) { normalise(io, begin, end); }
MOETRAIN_CLONES void run(const RmsNormBackward<float>& io, float* dweight_CD, int64_t begin, int64_t end) {
    go_back(io, dweight_CD, begin, end);
}
void run(const RmsNormBackward<double>& io, double* dweight_CD, int64_t begin, int64_t end) {
    go_back(io, dweight_CD, begin, end);
}

int64_t per_task(int64_t elements) { return std::max<int64_t>(1, kElementsPerTask / elements); }

}  // namespace

template <typename Acc>
void rms_norm_kernel(const RmsNormForward<Acc>& io) {
    at::parallel_for(0, io.num_rows, per_task(io.width), [&](int64_t begin, int64_t end) { run(io, begin, end); });
}

template <typename Acc>
void rms_norm_backward_kernel(const RmsNormBackward<Acc>& io) {
    const int64_t num_chunks = (io.num_rows + kRowsPerChunk - 1) / kRowsPerChunk;
    std::vector<Acc> dweight_CD(num_chunks * io.width);
    at::parallel_for(0, num_chunks, per_task(kRowsPerChunk * io.width),
                     [&](int64_t begin, int64_t end) { run(io, dweight_CD.data(), begin, end); });
    // There may be many chunks: in double their sum costs nothing that shows.
    std::vector<double> sum_D(io.width);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        for (int64_t d = 0; d < io.width; ++d)
            sum_D[d] += static_cast<double>(dweight_CD[chunk * io.width + d]);
    }
    std::transform(sum_D.begin(), sum_D.end(), io.dweight_D, [](double sum) { return static_cast<Acc>(sum); });
}

template void rms_norm_kernel(const RmsNormForward<float>&);
template void rms_norm_kernel(const RmsNormForward<double>&);
template void rms_norm_backward_kernel(const RmsNormBackward<float>&);
template void rms_norm_backward_kernel(const RmsNormBackward<double>&);

}  // namespace moetrain
