#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "cpu/chunks/chunks.h"
#include "ops/chunks/chunks.h"

namespace moetrain {
namespace {

constexpr int64_t kBytesPerTask = 1 << 16;  // below this a second thread costs more than it copies

// Calls work(chunk, start, size) for pieces that cover all chunks; end[n] is the sum of the first n + 1 lengths.
template <typename Work>
void for_each_piece(const std::vector<int64_t>& end, int64_t elem_bytes, const Work& work) {
    if (end.empty()) return;
    at::parallel_for(0, end.back(), kBytesPerTask / elem_bytes, [&](int64_t from, int64_t to) {
        auto chunk = std::upper_bound(end.begin(), end.end(), from) - end.begin();
        for (; from < to; ++chunk) {
            const int64_t begin = chunk == 0 ? 0 : end[chunk - 1];
            const int64_t size = std::min(to, end[chunk]) - from;
            work(chunk, from - begin, size);
            from += size;
        }
    });
}

template <typename From, typename To>
void copy_by_table(const at::Tensor& source, const at::Tensor& table_N3, at::Tensor& target) {
    const auto* table = table_N3.const_data_ptr<int64_t>();
    std::vector<int64_t> end(table_N3.size(0));
    int64_t total = 0;
    for (size_t n = 0; n < end.size(); ++n)
        end[n] = total += table[n * kCopyColumns + 2];
    const auto* from = source.const_data_ptr<From>();
    auto* to = target.mutable_data_ptr<To>();
    for_each_piece(end, std::max(sizeof(From), sizeof(To)), [&](int64_t n, int64_t start, int64_t size) {
        const int64_t* row = table + n * kCopyColumns;
        copy_chunk(from + row[0] + start, size, to + row[1] + start);
    });
}

template <typename From, typename To>
void sum_by_table(at::TensorList sources, const at::Tensor& table_N4, at::Tensor& target) {
    constexpr bool kWide = std::is_same_v<From, double> || std::is_same_v<To, double>;
    using Acc = std::conditional_t<kWide, double, float>;
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
    auto* to = target.mutable_data_ptr<To>();
    for_each_piece(end, std::max(sizeof(From), sizeof(To)), [&](int64_t group, int64_t start, int64_t size) {
        const int64_t* rows = table + first[group] * kSumColumns;
        sum_chunks<From, To, Acc>(data.data(), rows, first[group + 1] - first[group], start, size,
                                  to + rows[2] + start);
    });
}

// Calls work(From{}, To{}) with zeros of the two types.
template <typename Work>
void with_types(at::ScalarType from, at::ScalarType to, const Work& work) {
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, from, "chunks", [&] {
        using From = scalar_t;
        AT_DISPATCH_FLOATING_TYPES_AND2(at::kBFloat16, at::kHalf, to, "chunks", [&] { work(From{}, scalar_t{}); });
    });
}

void copy_chunks(const char* op, const at::Tensor& source, const at::Tensor& table_N3, at::Tensor& target) {
    check_copy_values(op, table_N3, source.numel(), target.numel());
    with_types(source.scalar_type(), target.scalar_type(),
               [&](auto from, auto to) { copy_by_table<decltype(from), decltype(to)>(source, table_N3, target); });
}

}  // namespace

at::Tensor pack_chunks_cpu(const at::Tensor& source, const at::Tensor& table_N3, int64_t size, at::ScalarType dtype) {
    check_pack_chunks(source, table_N3, size, dtype);
    auto packed = at::empty({size}, source.options().dtype(dtype));
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
    with_types(sources[0].scalar_type(), target.scalar_type(),
               [&](auto from, auto to) { sum_by_table<decltype(from), decltype(to)>(sources, table_N4, target); });
}

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
    m.impl("pack_chunks", &pack_chunks_cpu);
    m.impl("unpack_chunks_", &unpack_chunks_cpu);
    m.impl("add_sources_", &add_sources_cpu);
}

}  // namespace moetrain
