#include "comm/plan/routes.h"

#include <algorithm>
#include <numeric>

namespace moetrain::comm {
namespace {

// The holders of one node: [begin, end) of the expert's, and the rank that leads there.
struct NodeRun {
    int32_t node, begin, end, leader;
};

class Derivation {
 public:
    Derivation(const PlacementArrays& placement, const Viewpoint& from)
        : placement_(placement), from_(from), node_(node_of(from.rank)), led_(placement.num_ranks(), 0) {
        reserve();
        for (int64_t e = 0; e < placement.num_experts; ++e) {
            const auto my_shard = static_cast<int32_t>(from.rank % placement.num_shards);
            const auto first = from.everywhere ? 0 : my_shard;
            const auto last = from.everywhere ? static_cast<int32_t>(placement.num_shards) - 1 : my_shard;
            for (int32_t shard = first; shard <= last; ++shard)
                add_shard(e, shard);
        }
    }

    Routes take() { return std::move(routes_); }

 private:
    int32_t node_of(int32_t rank) const { return rank / from_.ranks_per_node; }

    int32_t owner_of(int64_t e, int32_t shard, int64_t s) const {
        return static_cast<int32_t>(placement_.owner_ES[e * placement_.num_slices + s] * placement_.num_shards + shard);
    }

    void reserve() {
        const auto seats = static_cast<size_t>(placement_.offset_E1[placement_.num_experts] * placement_.num_slices);
        routes_.chunks.reserve(std::min<size_t>(seats, placement_.num_experts * placement_.num_slices));
    }

    void find_holders(int64_t e, int32_t shard) {
        holders_.clear();
        if (from_.everywhere) {
            holders_.resize(placement_.num_ranks());
            std::iota(holders_.begin(), holders_.end(), 0);
            return;
        }
        for (int32_t z = placement_.offset_E1[e]; z < placement_.offset_E1[e + 1]; ++z)
            holders_.push_back(static_cast<int32_t>(placement_.holder_Z[z] * placement_.num_shards + shard));
    }

    // Every rank does this for every expert, since each leader depends on those before it.
    void find_nodes(int64_t e, int32_t shard) {
        nodes_.clear();
        for (int32_t i = 0; i < static_cast<int32_t>(holders_.size()); ++i) {
            const int32_t node = node_of(holders_[i]);
            if (nodes_.empty() || nodes_.back().node != node) nodes_.push_back({node, i, i, kNone});
            nodes_.back().end = i + 1;
        }
        for (NodeRun& run : nodes_) {
            int32_t chunks = 0;
            for (int64_t s = 0; s < placement_.num_slices; ++s)
                chunks += node_of(owner_of(e, shard, s)) != run.node;
            if (chunks == 0) continue;
            const auto fewer = [&](int32_t a, int32_t b) { return led_[a] < led_[b]; };
            run.leader = *std::min_element(holders_.begin() + run.begin, holders_.begin() + run.end, fewer);
            led_[run.leader] += chunks;
        }
    }

    void add_shard(int64_t e, int32_t shard) {
        find_holders(e, shard);
        find_nodes(e, shard);
        const auto mine = [&](const NodeRun& run) { return run.node == node_; };
        const auto run = std::find_if(nodes_.begin(), nodes_.end(), mine);
        const bool holds = std::binary_search(holders_.begin(), holders_.end(), from_.rank);
        for (int64_t s = 0; s < placement_.num_slices; ++s) {
            const int32_t owner = owner_of(e, shard, s);
            if (owner != from_.rank && !holds) continue;
            const auto chunk = static_cast<int32_t>(routes_.chunks.size());
            routes_.chunks.push_back({(e * placement_.num_shards + shard) * placement_.num_slices + s,
                                      owner == from_.rank ? routes_.num_owned++ : kNone,
                                      holds ? routes_.num_held++ : kNone});
            if (owner == from_.rank) {
                add_owner(chunk);
            } else if (node_of(owner) == node_) {
                connect(chunk, owner, 0, 0);
            } else if (run->leader == from_.rank) {
                add_leader(chunk, owner, *run);
            } else {
                connect(chunk, run->leader, 1, 0);
            }
        }
    }

    // This rank gets the chunk from `source` in one hop of the all-gather, and returns it in one of the reduce-scatter.
    void connect(int32_t chunk, int32_t source, int gather_hop, int scatter_hop) {
        routes_.gather_in[gather_hop].push_back({source, chunk});
        routes_.scatter_out[scatter_hop].push_back({source, chunk});
    }

    void add_leader(int32_t chunk, int32_t owner, const NodeRun& run) {
        connect(chunk, owner, 0, 1);
        Terms terms = begin_terms(chunk);
        add_inside(chunk, run, 1);
        end_terms(terms);
    }

    void add_owner(int32_t chunk) {
        Terms terms = begin_terms(chunk);
        for (const NodeRun& run : nodes_) {
            if (run.node == node_) {
                terms.across_before = static_cast<int32_t>(routes_.scatter_in[1].size()) - terms.across_begin;
                add_inside(chunk, run, 0);
            } else {
                routes_.gather_out[0].push_back({run.leader, chunk});
                routes_.scatter_in[1].push_back({run.leader, chunk});
            }
        }
        end_terms(terms);
    }

    // The node's other holders get the chunk from this rank and return it, this rank's own among them where it holds.
    void add_inside(int32_t chunk, const NodeRun& run, int gather_hop) {
        for (int32_t i = run.begin; i < run.end; ++i) {
            if (holders_[i] == from_.rank) {
                routes_.inside_terms.push_back(kNone);
                continue;
            }
            routes_.gather_out[gather_hop].push_back({holders_[i], chunk});
            routes_.inside_terms.push_back(static_cast<int32_t>(routes_.scatter_in[0].size()));
            routes_.scatter_in[0].push_back({holders_[i], chunk});
        }
    }

    Terms begin_terms(int32_t chunk) const {
        const auto inside = static_cast<int32_t>(routes_.inside_terms.size());
        const auto across = static_cast<int32_t>(routes_.scatter_in[1].size());
        return {chunk, inside, inside, across, across, 0};
    }

    void end_terms(Terms& terms) {
        terms.inside_end = static_cast<int32_t>(routes_.inside_terms.size());
        terms.across_end = static_cast<int32_t>(routes_.scatter_in[1].size());
        routes_.terms.push_back(terms);
    }

    const PlacementArrays& placement_;
    const Viewpoint from_;
    const int32_t node_;
    std::vector<int64_t> led_;  // chunks that each rank leads so far
    std::vector<int32_t> holders_;
    std::vector<NodeRun> nodes_;
    Routes routes_;
};

}  // namespace

Routes derive_routes(const PlacementArrays& placement, const Viewpoint& from) {
    return Derivation(placement, from).take();
}

}  // namespace moetrain::comm
