// The sparse collectives of one rank, in flight one behind another over a c10d process group.
//
// On the CPU (gloo) messages move while the caller computes; what must happen between two hops, and after the last one,
// happens when somebody waits, asks for progress, or starts the collective after next. On other devices (NCCL)
// everything is queued at the start, on a stream of its own, each hop's messages as one group; waiting makes the
// caller's stream wait. What of this has run where: docs/gpu-status.md.
#pragma once
#include <ATen/core/Tensor.h>
#include <ATen/core/ivalue.h>
#include <c10/core/Event.h>
#include <c10/core/Stream.h>

#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <utility>
#include <vector>

#include "comm/transfer/arena.h"
#include "comm/transfer/plan.h"

namespace moetrain::comm {

// The operators unpack_chunks_ and add_sources_, which lie above this room.
struct ChunkOperators {
    void (*copy)(at::Tensor target, const at::Tensor& source, const at::Tensor& table_N3);
    void (*sum)(at::Tensor target, const std::vector<at::Tensor>& sources, const at::Tensor& table_N4);
};

struct Site {
    c10::intrusive_ptr<c10d::ProcessGroup> group;  // null for one rank
    int32_t rank, num_ranks, ranks_per_node;
    ChunkOperators operators;
    size_t max_plans;
};

class SparseCollectives : public torch::CustomClassHolder {
 public:
    explicit SparseCollectives(Site site);

    const Site& site() const { return site_; }
    c10::intrusive_ptr<SparsePlan> plan(const PlacementArrays& placement, bool everywhere);

    // Starts a collective and returns its ticket; the caller has checked that plan and tensors fit. Messages have the
    // type of the held chunks. Of each arena two are in flight at most: the one before the last is finished first, on
    // every rank alike.
    int64_t start(Collective collective, c10::intrusive_ptr<SparsePlan> plan, const at::Tensor& owned_CL,
                  const at::Tensor& held_HL, const std::string& purpose);
    // Sends what follows from the first hop, once that has come. For the CPU; elsewhere it is queued already.
    void progress(int64_t ticket);
    // Finishes the collective of that ticket and all that were started before it.
    void wait(int64_t ticket);

    const std::vector<int64_t>& sent_bytes() const { return sent_bytes_; }  // to each rank, as posted
    int64_t arena_bytes() const;
    int64_t num_plans() const { return static_cast<int64_t>(plans_.size()); }

 private:
    // One call of the group's, or, where they are grouped, a hop's calls.
    struct Posted {
        c10::intrusive_ptr<c10d::Work> work;
        int hop;
        bool sends;
        const Message* message;  // null for a group
    };

    struct Transfer {
        int64_t ticket;
        Collective collective;
        std::string purpose;
        c10::intrusive_ptr<SparsePlan> plan;
        const Program* program;
        std::shared_ptr<const Tables> tables;
        std::array<at::Tensor, kNumBuffers> buffers;  // flat
        int next_stage = 0;
        std::vector<Posted> posted;
        std::optional<c10::Event> done;  // of other devices than the CPU
    };

    Transfer make_transfer(Collective collective, c10::intrusive_ptr<SparsePlan> plan, const at::Tensor& owned_CL,
                           const at::Tensor& held_HL, const std::string& purpose);
    void lend(Transfer& transfer, int64_t messages, int64_t work);
    void start_here(Transfer& transfer);
    void queue_on_device(Transfer& transfer);
    void open_communicator(at::Device device);
    void run_stage(Transfer& transfer);
    void advance(Transfer& transfer);
    void wait_for_sends(Transfer& transfer);  // once: gloo waits for another completion each time
    void finish(Transfer& transfer);
    void finish_through(int64_t ticket);
    void post(Transfer& transfer, int hop, const Message& message, bool sends);
    void post_group(Transfer& transfer, int hop);
    void wait_for(Transfer& transfer, const Posted& posted);
    void require_whole() const;
    [[noreturn]] void fail(const Transfer& transfer, const Posted& posted, const std::string& what);
    Arena& arena_of(const at::Tensor& like);

    Site site_;
    PlanCache plans_;
    std::mutex mutex_;
    int64_t next_ticket_ = 0;
    std::deque<Transfer> in_flight_;
    std::map<std::pair<std::string, at::ScalarType>, Arena> arenas_;  // by device and type
    std::vector<int64_t> sent_bytes_;
    std::optional<c10::Stream> stream_;  // of a device other than the CPU
    std::string failure_;                // the first, after which nothing works
};

}  // namespace moetrain::comm
