#include <ATen/Parallel.h>

#include "cpu/chunks/chunks.h"
#include "ops/chunks/chunks.h"
#include "ops/common/tensors.h"

namespace moetrain {
namespace {

constexpr int64_t kBytesPerChunkTask = 1 << 16;  // below this a second thread costs more than it copies

// Calls work(chunk, start, size) for pieces that cover all chunks; end[n] is the sum of the first n + 1 lengths.
template <typename Work>
void for_each_piece(const std::vector<int64_t>& end, int64_t elem_bytes, const Work& work) {
    if (end.empty()) return;
    at::parallel_for(0, end.back(), kBytesPerChunkTask / elem_bytes, [&](int64_t from, int64_t to) {
        auto chunk = std::upper_bound(end.begin(), end.end(), from) - end.begin();
        for (; from < to; ++chunk) {
            const int64_t begin = chunk == 0 ? 0 : end[chunk - 1];
            const int64_t size = std::min(to, end[chunk]) - from;
            work(chunk, from - begin, size);
            from += size;
        }
    });
}

void copy_chunks(const char* op, const at::Tensor& source, const at::Tensor& table_N3, at::Tensor& target) {
    check_copy_values(op, table_N3, source.numel(), target.numel());
    const ChunkKernels kernels = chunk_kernels(source.scalar_type(), target.scalar_type());
    const auto* table = table_N3.const_data_ptr<int64_t>();
    std::vector<int64_t> end(table_N3.size(0));
    int64_t total = 0;
    for (size_t n = 0; n < end.size(); ++n)
        end[n] = total += table[n * kCopyColumns + 2];
    const auto* from = static_cast<const char*>(source.const_data_ptr());
    auto* to = static_cast<char*>(target.mutable_data_ptr());
    for_each_piece(end, std::max(kernels.from_bytes, kernels.to_bytes), [&](int64_t n, int64_t start, int64_t size) {
        const int64_t* row = table + n * kCopyColumns;
        kernels.copy(from + (row[0] + start) * kernels.from_bytes, size, to + (row[1] + start) * kernels.to_bytes);
    });
}

}  // namespace

at::Tensor pack_chunks_cpu(const at::Tensor& source, const at::Tensor& table_N3, int64_t size, at::ScalarType dtype) {
    check_pack_chunks(source, table_N3, size, dtype);
    auto packed = new_empty({size}, source.options().dtype(dtype));
    copy_chunks("pack_chunks", source, table_N3, packed);
    return packed;
}

void unpack_chunks_cpu(at::Tensor& target, const at::Tensor& source, const at::Tensor& table_N3) {
    check_unpack_chunks(target, source, table_N3);
    copy_chunks("unpack_chunks_", source, table_N3, target);
}

void add_sources_cpu(at::Tensor& target, at::TensorList sources, const at::Tensor& table_N4) {
    check_add_sources(target, sources, table_N4);
    check_sum_values(sources, table_N4, target.numel());
    const ChunkKernels kernels = chunk_kernels(sources[0].scalar_type(), target.scalar_type());
    const auto* table = table_N4.const_data_ptr<int64_t>();
    const int64_t num_rows = table_N4.size(0);
    std::vector<int64_t> first, end;  // of each destination: its first row, and the sum of lengths
    int64_t total = 0;
    for (int64_t n = 0; n < num_rows; ++n) {
        if (adds_to_previous(table, n)) continue;
        first.push_back(n);
        end.push_back(total += table[n * kSumColumns + 3]);
    }
    first.push_back(num_rows);
    std::vector<const void*> data;
    for (const auto& source : sources)
        data.push_back(source.const_data_ptr());
    auto* to = static_cast<char*>(target.mutable_data_ptr());
    const int64_t elem_bytes = std::max(kernels.from_bytes, kernels.to_bytes);
    for_each_piece(end, elem_bytes, [&](int64_t group, int64_t start, int64_t size) {
        const int64_t* rows = table + first[group] * kSumColumns;
        kernels.sum(data.data(), rows, first[group + 1] - first[group], start, size,
                    to + (rows[2] + start) * kernels.to_bytes);
    });
}

}  // namespace moetrain
