// Contract of pack_chunks, unpack_chunks_ and add_sources_: flat chunks copied, or summed, by a table.
//
// Tables are int64 and contiguous, on the operands' device: offsets and lengths are in elements, counted from a
// tensor's first one. What no chunk covers is left as it is. Every operand is contiguous, of any shape and dtype of the
// compute dtypes: values are converted on the way.
#pragma once
#include <algorithm>
#include <vector>

#include "ops/common/checks.h"

namespace moetrain {

constexpr int64_t kCopyColumns = 3;  // source offset, destination offset, length
constexpr int64_t kSumColumns = 4;   // which source, offset in it, destination offset, length
constexpr int64_t kMaxSources = 16;  // their addresses travel as an argument of the CUDA kernel

inline void check_chunk_operand(const char* op, const char* name, const at::Tensor& x) {
    check_float(op, name, x);
    check_contiguous(op, name, x);
}

inline void check_chunk_table(const char* op, const at::Tensor& table, int64_t columns, const char* legend,
                              const at::Tensor& target) {
    TORCH_CHECK_VALUE(table.dim() == 2 && table.size(1) == columns, op, ": table must be ", legend, ", got ",
                      table.sizes());
    check_dtype(op, "table", table, at::kLong);
    check_contiguous(op, "table", table);
    check_same_device(op, "table", table, "the target", target);
}

// What is written may not be what is read: the order of the copies is not defined.
inline void check_apart(const char* op, const char* name, const at::Tensor& source, const at::Tensor& target) {
    const auto begin = [](const at::Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); };
    const bool apart = source.numel() == 0 || target.numel() == 0 || begin(source) + source.nbytes() <= begin(target) ||
                       begin(target) + target.nbytes() <= begin(source);
    TORCH_CHECK_VALUE(apart, op, ": ", name, " and the target must not share memory; write into another tensor");
}

inline void check_pack_chunks(const at::Tensor& source, const at::Tensor& table_N3, int64_t size,
                              at::ScalarType dtype) {
    constexpr auto op = "pack_chunks";
    check_chunk_operand(op, "source", source);
    check_chunk_table(op, table_N3, kCopyColumns, "[N, 3] (source, destination, length)", source);
    TORCH_CHECK_VALUE(size >= 0, op, ": size must be at least 0, got ", size);
    TORCH_CHECK_TYPE(is_float(dtype), op, ": dtype must be float32, bfloat16, float16 or float64, got ", dtype);
}

inline void check_unpack_chunks(const at::Tensor& target, const at::Tensor& source, const at::Tensor& table_N3) {
    constexpr auto op = "unpack_chunks_";
    check_chunk_operand(op, "source", source);
    check_chunk_operand(op, "target", target);
    check_same_device(op, "source", source, "the target", target);
    check_chunk_table(op, table_N3, kCopyColumns, "[N, 3] (source, destination, length)", target);
    check_apart(op, "source", source, target);
}

inline void check_add_sources(const at::Tensor& target, at::TensorList sources, const at::Tensor& table_N4) {
    constexpr auto op = "add_sources_";
    check_chunk_operand(op, "target", target);
    const auto num_sources = static_cast<int64_t>(sources.size());
    TORCH_CHECK_VALUE(num_sources >= 1 && num_sources <= kMaxSources, op, ": sources must be 1 to ", kMaxSources,
                      " tensors, got ", num_sources, "; receive messages into one tensor");
    for (const auto& source : sources) {
        check_chunk_operand(op, "each source", source);
        check_dtype(op, "each source", source, sources[0].scalar_type());
        check_same_device(op, "a source", source, "the target", target);
        check_apart(op, "a source", source, target);
    }
    check_chunk_table(op, table_N4, kSumColumns, "[N, 4] (which source, offset in it, destination, length)", target);
}

// Of a table on the host: chunks lie inside the tensors.
inline void check_chunk_inside(const char* op, int64_t n, const char* what, int64_t offset, int64_t length,
                               int64_t numel) {
    TORCH_CHECK_VALUE(offset >= 0 && length >= 0 && length <= numel && offset <= numel - length, op, ": chunk ", n,
                      " must lie inside the ", what, " of ", numel, " elements, got offset ", offset, " and length ",
                      length);
}

// Of a table on the host: destinations of different chunks do not overlap. `belongs(n)`: row n adds to row n - 1.
template <typename Belongs>
void check_destinations_apart(const char* op, const int64_t* table, int64_t num_rows, int64_t columns,
                              const Belongs& belongs) {
    std::vector<int64_t> order;
    for (int64_t n = 0; n < num_rows; ++n)
        if (table[n * columns + columns - 1] > 0 && !belongs(n)) order.push_back(n);
    const auto begin = [&](int64_t n) { return table[n * columns + columns - 2]; };
    const auto before = [&](int64_t a, int64_t b) { return begin(a) < begin(b); };
    if (!std::is_sorted(order.begin(), order.end(), before)) std::stable_sort(order.begin(), order.end(), before);
    for (size_t i = 1; i < order.size(); ++i) {
        const int64_t end = begin(order[i - 1]) + table[order[i - 1] * columns + columns - 1];
        TORCH_CHECK_VALUE(end <= begin(order[i]), op, ": destinations must not overlap, but chunk ", order[i - 1],
                          " ends at ", end, " and chunk ", order[i], " begins at ", begin(order[i]),
                          columns == kSumColumns ? "; put rows of one destination and length next to each other" : "");
    }
}

inline void check_copy_values(const char* op, const at::Tensor& table_N3, int64_t source_numel, int64_t target_numel) {
    const auto* table = table_N3.const_data_ptr<int64_t>();
    for (int64_t n = 0; n < table_N3.size(0); ++n) {
        const int64_t* row = table + n * kCopyColumns;
        check_chunk_inside(op, n, "source", row[0], row[2], source_numel);
        check_chunk_inside(op, n, "target", row[1], row[2], target_numel);
    }
    check_destinations_apart(op, table, table_N3.size(0), kCopyColumns, [](int64_t) { return false; });
}

// Whether row n of a sum's table adds to the same destination as the row before it.
inline bool adds_to_previous(const int64_t* table, int64_t n) {
    const int64_t* row = table + n * kSumColumns;
    return n > 0 && row[2] == row[2 - kSumColumns] && row[3] == row[3 - kSumColumns];
}

inline void check_sum_values(at::TensorList sources, const at::Tensor& table_N4, int64_t target_numel) {
    constexpr auto op = "add_sources_";
    const auto* table = table_N4.const_data_ptr<int64_t>();
    const auto num_sources = static_cast<int64_t>(sources.size());
    for (int64_t n = 0; n < table_N4.size(0); ++n) {
        const int64_t* row = table + n * kSumColumns;
        TORCH_CHECK_VALUE(row[0] >= 0 && row[0] < num_sources, op, ": chunk ", n, " must come from a source in [0, ",
                          num_sources, "), got ", row[0]);
        check_chunk_inside(op, n, "source", row[1], row[3], sources[row[0]].numel());
        check_chunk_inside(op, n, "target", row[2], row[3], target_numel);
    }
    check_destinations_apart(op, table, table_N4.size(0), kSumColumns,
                             [table](int64_t n) { return adds_to_previous(table, n); });
}

// A new tensor [size] of `dtype` with the chunks of `source` at their destinations.
at::Tensor pack_chunks_cpu(const at::Tensor& source, const at::Tensor& table_N3, int64_t size, at::ScalarType dtype);
// The chunks of `source` at their destinations in `target`.
void unpack_chunks_cpu(at::Tensor& target, const at::Tensor& source, const at::Tensor& table_N3);
// Neighbouring rows of one destination and length are summed, in their order, in at least float32, and rounded once.
void add_sources_cpu(at::Tensor& target, at::TensorList sources, const at::Tensor& table_N4);

}  // namespace moetrain
