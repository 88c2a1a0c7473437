// A placement's plan on one rank, with the tables of its copies and sums, made once for each length and device.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>

#include <array>
#include <list>
#include <memory>
#include <unordered_map>
#include <vector>

#include "comm/plan/program.h"

namespace moetrain::comm {

enum class Collective : int8_t { kAllGather, kReduceScatter };

// Tables as the operators pack_chunks and add_sources_ take them: int64, in elements.
struct StageTables {
    std::vector<at::Tensor> copies;  // [N, 3] of each of the stage's copies
    at::Tensor sums;                 // [N, 4], undefined where there are none; sources are those of sum_sources
};
struct Tables {
    int64_t length;
    at::Device device;
    std::array<StageTables, kStages> stages;
};

// What may be added up: all buffers but the one that the sums go to.
std::vector<Buffer> sum_sources(Buffer to);

class TabledProgram {
 public:
    explicit TabledProgram(Program program) : program_(std::move(program)) {}

    const Program& program() const { return program_; }
    // Of chunks of `length` elements. Few are kept: layers of one model have chunks of one length.
    std::shared_ptr<const Tables> tables(int64_t length, at::Device device);

 private:
    Program program_;
    std::list<std::shared_ptr<const Tables>> tables_;
};

class SparsePlan : public torch::CustomClassHolder {
 public:
    SparsePlan(const PlacementArrays& placement, const Viewpoint& from);

    const Routes& routes() const { return routes_; }
    const Viewpoint& viewpoint() const { return from_; }
    int32_t num_ranks() const { return num_ranks_; }
    // `converts`: the owned chunks have another type than the messages.
    TabledProgram& program(Collective collective, bool converts);
    std::vector<int64_t> count_sent(Collective collective) const;  // chunks, to each rank
    bool is_of(const PlacementArrays& placement, const Viewpoint& from) const;

 private:
    std::vector<int32_t> numbers_;  // the placement's, to compare with
    Viewpoint from_;
    int32_t num_ranks_;
    Routes routes_;
    std::array<std::unique_ptr<TabledProgram>, 4> programs_;  // made when first asked for
};

// The plans used last. What is dropped lives on while a collective or a caller has it.
class PlanCache {
 public:
    explicit PlanCache(size_t capacity) : capacity_(capacity) {}

    c10::intrusive_ptr<SparsePlan> find_or_make(const PlacementArrays& placement, const Viewpoint& from);
    size_t size() const { return plans_.size(); }

 private:
    struct Entry {
        uint64_t hash;
        c10::intrusive_ptr<SparsePlan> plan;
    };

    size_t capacity_;
    std::list<Entry> plans_;  // the one used last is the first
    std::unordered_multimap<uint64_t, std::list<Entry>::iterator> by_hash_;
};

}  // namespace moetrain::comm
