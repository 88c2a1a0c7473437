#include "comm/transfer/plan.h"

#include <ATen/ops/empty.h>

#include <algorithm>

namespace moetrain::comm {
namespace {

constexpr size_t kMostTables = 4;

// All that tells placements apart, in one list.
std::vector<int32_t> numbers_of(const PlacementArrays& placement) {
    const auto E = placement.num_experts;
    std::vector<int32_t> numbers{static_cast<int32_t>(placement.num_slices), static_cast<int32_t>(placement.num_groups),
                                 static_cast<int32_t>(placement.num_shards)};
    numbers.insert(numbers.end(), placement.owner_ES, placement.owner_ES + E * placement.num_slices);
    numbers.insert(numbers.end(), placement.offset_E1, placement.offset_E1 + E + 1);
    numbers.insert(numbers.end(), placement.holder_Z, placement.holder_Z + placement.offset_E1[E]);
    return numbers;
}

// FNV-1a, a number at a time. Plans of one hash are compared, so that it need not be perfect.
uint64_t hash_of(const std::vector<int32_t>& numbers, bool everywhere) {
    uint64_t hash = 0xcbf29ce484222325ULL + static_cast<uint64_t>(everywhere);
    for (const int32_t number : numbers)
        hash = (hash ^ static_cast<uint32_t>(number)) * 0x100000001b3ULL;
    return hash;
}

at::Tensor table_of(const std::vector<int64_t>& numbers, int64_t columns, at::Device device) {
    const auto num_rows = static_cast<int64_t>(numbers.size()) / columns;
    auto table = at::empty({num_rows, columns}, at::TensorOptions().dtype(at::kLong));
    std::copy(numbers.begin(), numbers.end(), table.mutable_data_ptr<int64_t>());
    return table.to(device);
}

// Neighbouring rows that go to neighbouring rows are one.
at::Tensor copy_table(const Copies& copies, int64_t length, at::Device device) {
    std::vector<int64_t> numbers;
    const std::array<int32_t, 2>* before = nullptr;
    for (const auto& row : copies.rows) {
        if (before != nullptr && row[0] == (*before)[0] + 1 && row[1] == (*before)[1] + 1) {
            numbers.back() += length;
        } else {
            numbers.insert(numbers.end(), {row[0] * length, row[1] * length, length});
        }
        before = &row;
    }
    return table_of(numbers, 3, device);
}

at::Tensor sum_table(const Sums& sums, int64_t length, at::Device device) {
    const auto sources = sum_sources(sums.to);
    std::vector<int64_t> numbers;
    numbers.reserve(sums.terms.size() * 4);
    for (const Term& term : sums.terms) {
        const auto source = std::find(sources.begin(), sources.end(), term.from.buffer) - sources.begin();
        numbers.insert(numbers.end(), {source, term.from.row * length, term.to * length, length});
    }
    return table_of(numbers, 4, device);
}

}  // namespace

std::vector<Buffer> sum_sources(Buffer to) {
    if (to == Buffer::kWork) return {Buffer::kHeld, Buffer::kMessages};
    return {Buffer::kHeld, Buffer::kMessages, Buffer::kWork};
}

std::shared_ptr<const Tables> TabledProgram::tables(int64_t length, at::Device device) {
    for (const auto& known : tables_)
        if (known->length == length && known->device == device) return known;
    auto made = std::make_shared<Tables>(Tables{length, device, {}});
    for (int i = 0; i < kStages; ++i) {
        const Stage& stage = program_.stages[i];
        for (const Copies& copies : stage.copies)
            made->stages[i].copies.push_back(copy_table(copies, length, device));
        if (!stage.sums.terms.empty()) made->stages[i].sums = sum_table(stage.sums, length, device);
    }
    if (tables_.size() == kMostTables) tables_.pop_front();
    return tables_.emplace_back(std::move(made));
}

SparsePlan::SparsePlan(const PlacementArrays& placement, const Viewpoint& from)
    : numbers_(numbers_of(placement)),
      from_(from),
      num_ranks_(static_cast<int32_t>(placement.num_ranks())),
      routes_(derive_routes(placement, from)) {}

TabledProgram& SparsePlan::program(Collective collective, bool converts) {
    auto& made = programs_[2 * static_cast<size_t>(collective) + static_cast<size_t>(converts)];
    if (made == nullptr) {
        const auto make = collective == Collective::kAllGather ? &gather_program : &scatter_program;
        made = std::make_unique<TabledProgram>(make(routes_, from_, num_ranks_, converts));
    }
    return *made;
}

std::vector<int64_t> SparsePlan::count_sent(Collective collective) const {
    std::vector<int64_t> sent(num_ranks_, 0);
    for (const auto& edges : collective == Collective::kAllGather ? routes_.gather_out : routes_.scatter_out)
        for (const Edge& edge : edges)
            ++sent[edge.peer];
    return sent;
}

bool SparsePlan::is_of(const PlacementArrays& placement, const Viewpoint& from) const {
    return from.rank == from_.rank && from.ranks_per_node == from_.ranks_per_node &&
           from.everywhere == from_.everywhere && numbers_of(placement) == numbers_;
}

c10::intrusive_ptr<SparsePlan> PlanCache::find_or_make(const PlacementArrays& placement, const Viewpoint& from) {
    const uint64_t hash = hash_of(numbers_of(placement), from.everywhere);
    const auto [begin, end] = by_hash_.equal_range(hash);
    for (auto found = begin; found != end; ++found) {
        if (!found->second->plan->is_of(placement, from)) continue;
        plans_.splice(plans_.begin(), plans_, found->second);
        return plans_.front().plan;
    }
    if (plans_.size() == capacity_) {
        const auto oldest = std::prev(plans_.end());
        const auto [first, last] = by_hash_.equal_range(oldest->hash);
        by_hash_.erase(std::find_if(first, last, [&](const auto& pair) { return pair.second == oldest; }));
        plans_.pop_back();
    }
    plans_.push_front({hash, c10::make_intrusive<SparsePlan>(placement, from)});
    by_hash_.emplace(hash, plans_.begin());
    return plans_.front().plan;
}

}  // namespace moetrain::comm
