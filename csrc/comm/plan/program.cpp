#include "comm/plan/program.h"

#include <algorithm>
#include <numeric>
#include <span>

namespace moetrain::comm {
namespace {

enum class Direction { kSend, kReceive };

// Edges by peer, in the order in which peers go round; those of one peer stay in their order.
class ByPeer {
 public:
    ByPeer(const std::vector<Edge>& edges, int32_t rank, int32_t num_ranks, Direction direction)
        : order_(edges.size()), begin_(num_ranks + 1, 0) {
        const auto distance = [&](const Edge& edge) {
            const int32_t ahead = direction == Direction::kSend ? edge.peer - rank : rank - edge.peer;
            return ahead < 0 ? ahead + num_ranks : ahead;
        };
        for (const Edge& edge : edges)
            ++begin_[distance(edge) + 1];
        std::partial_sum(begin_.begin(), begin_.end(), begin_.begin());
        std::vector<int32_t> next(begin_.begin(), begin_.end() - 1);
        for (size_t i = 0; i < edges.size(); ++i)
            order_[next[distance(edges[i])]++] = static_cast<int32_t>(i);
    }

    // Calls work(positions) with the positions of each peer's edges.
    template <typename Work>
    void for_each(const Work& work) const {
        for (size_t i = 0; i + 1 < begin_.size(); ++i)
            if (begin_[i] < begin_[i + 1]) work(std::span(order_).subspan(begin_[i], begin_[i + 1] - begin_[i]));
    }

 private:
    std::vector<int32_t> order_, begin_;
};

class Builder {
 public:
    Builder(const Routes& routes, const Viewpoint& from, int32_t num_ranks)
        : routes_(routes), rank_(from.rank), num_ranks_(num_ranks) {}

    Program take() { return std::move(program_); }

    Stage& stage(int idx) { return program_.stages[idx]; }
    int32_t add_work_row() { return program_.num_work++; }
    const Chunk& chunk_of(const Edge& edge) const { return routes_.chunks[edge.chunk]; }

    void copy(int stage_idx, Place from, Place to) {
        auto& all = stage(stage_idx).copies;
        const auto same = [&](const Copies& copies) { return copies.from == from.buffer && copies.to == to.buffer; };
        auto copies = std::find_if(all.begin(), all.end(), same);
        if (copies == all.end()) copies = all.insert(all.end(), Copies{from.buffer, to.buffer, {}});
        copies->rows.push_back({from.row, to.row});
    }

    // Messages of `edges`, whose chunks lie at source(edge): packed where they do not lie in one piece.
    template <typename Source>
    void add_sends(int stage_idx, const std::vector<Edge>& edges, const Source& source) {
        packed_.clear();
        const auto pack_them = [&](std::span<const int32_t> positions) { return pack(stage_idx, edges, positions); };
        add_sends(stage_idx, edges, source, pack_them);
    }

    // The same, where otherwise(positions) gives the place of a message that lies nowhere in one piece.
    template <typename Source, typename Otherwise>
    void add_sends(int stage_idx, const std::vector<Edge>& edges, const Source& source, const Otherwise& otherwise) {
        ByPeer(edges, rank_, num_ranks_, Direction::kSend).for_each([&](std::span<const int32_t> positions) {
            const Place lies = place(edges, positions, source);
            const Place first = lies.row == kNone ? otherwise(positions) : lies;
            stage(stage_idx).sends.push_back({edges[positions[0]].peer, first.buffer, first.row, size_of(positions)});
        });
    }

    // Messages of `edges`, whose chunks belong at target(edge) if they can go there. Returns where each edge's arrives.
    template <typename Target>
    std::vector<Place> add_receives(int stage_idx, const std::vector<Edge>& edges, const Target& target) {
        std::vector<Place> arrives(edges.size());
        ByPeer(edges, rank_, num_ranks_, Direction::kReceive).for_each([&](std::span<const int32_t> positions) {
            Place next = place(edges, positions, target);
            if (next.row == kNone) next = new_messages(size_of(positions));
            stage(stage_idx).receives.push_back({edges[positions[0]].peer, next.buffer, next.row, size_of(positions)});
            for (const int32_t i : positions)
                arrives[i] = {next.buffer, next.row++};
        });
        return arrives;
    }

    void add_term(int stage_idx, Place to, Place from) {
        stage(stage_idx).sums.to = to.buffer;
        stage(stage_idx).sums.terms.push_back({to.row, from});
    }

 private:
    static int32_t size_of(std::span<const int32_t> positions) { return static_cast<int32_t>(positions.size()); }

    // Where the first chunk of a message lies, or belongs, if they all do in one piece; else row kNone.
    template <typename Where>
    Place place(const std::vector<Edge>& edges, std::span<const int32_t> positions, const Where& where) {
        places_.clear();
        for (const int32_t i : positions)
            places_.push_back(where(edges[i]));
        for (size_t i = 1; i < places_.size(); ++i)
            if (places_[i].buffer != places_[0].buffer || places_[i].row != places_[i - 1].row + 1)
                return {places_[0].buffer, kNone};
        return places_[0];
    }

    Place new_messages(int32_t count) {
        const Place first{Buffer::kMessages, program_.num_messages};
        program_.num_messages += count;
        return first;
    }

    // Where the message lies that has the chunks at `positions`: hot experts' owners send many peers the same.
    Place pack(int stage_idx, const std::vector<Edge>& edges, std::span<const int32_t> positions) {
        const auto same = [&](const Packed& other) {
            const auto equal = [&](int32_t a, int32_t b) { return edges[a].chunk == edges[b].chunk; };
            return std::equal(positions.begin(), positions.end(), other.positions.begin(), other.positions.end(),
                              equal);
        };
        const auto found = std::find_if(packed_.begin(), packed_.end(), same);
        if (found != packed_.end()) return found->first;
        const Place first = new_messages(size_of(positions));
        packed_.push_back({{positions.begin(), positions.end()}, first});
        for (size_t i = 0; i < places_.size(); ++i)
            copy(stage_idx, places_[i], {first.buffer, first.row + static_cast<int32_t>(i)});
        return first;
    }

    struct Packed {
        std::vector<int32_t> positions;
        Place first;
    };

    const Routes& routes_;
    const int32_t rank_, num_ranks_;
    std::vector<Packed> packed_;
    std::vector<Place> places_;  // of the message at hand
    Program program_{};
};

// How many terms an owner adds up, or a leader.
int32_t num_terms(const Terms& terms) {
    return terms.inside_end - terms.inside_begin + terms.across_end - terms.across_begin;
}

// The reduce-scatter's sums. Where contributions arrive is known once the receives are laid out.
class Scatter {
 public:
    Scatter(const Routes& routes, const Viewpoint& from, int32_t num_ranks, bool converts)
        : routes_(routes),
          builder_(routes, from, num_ranks),
          terms_of_(routes.chunks.size(), nullptr),
          work_row_(routes.chunks.size(), kNone) {
        for (const Terms& terms : routes.terms)
            terms_of_[terms.chunk] = &terms;
        const auto held = [&](const Edge& edge) { return Place{Buffer::kHeld, builder_.chunk_of(edge).held}; };
        builder_.add_sends(0, routes.scatter_out[0], held);
        // A chunk with one contribution, from elsewhere, needs no sum.
        const auto target = [&](const Edge& edge) {
            const bool alone = !converts && num_terms(*terms_of_[edge.chunk]) == 1;
            return Place{Buffer::kOwned, alone ? builder_.chunk_of(edge).owned : kNone};
        };
        for (int hop = 0; hop < kHops; ++hop)
            arrives_[hop] = builder_.add_receives(hop, routes.scatter_in[hop], target);
        lead();
        add_up_own_nodes();
        for (const Terms& terms : routes.terms)
            if (routes.chunks[terms.chunk].owned != kNone) add_up(terms);
    }

    Program take() { return builder_.take(); }

 private:
    Place place_inside(const Terms& terms, int32_t i) const {
        const int32_t edge = routes_.inside_terms[i];
        return edge == kNone ? Place{Buffer::kHeld, routes_.chunks[terms.chunk].held} : arrives_[0][edge];
    }

    void add_inside(int stage_idx, const Terms& terms, Place to) {
        for (int32_t i = terms.inside_begin; i < terms.inside_end; ++i)
            builder_.add_term(stage_idx, to, place_inside(terms, i));
    }

    // Sums of this node, in the order in which they are sent: a sum then lies where its message wants it. What has one
    // term and lies as the message wants it is sent as it is.
    void lead() {
        const auto& edges = routes_.scatter_out[1];
        const auto alone = [&](const Edge& edge) {
            return Place{Buffer::kHeld, num_terms(*terms_of_[edge.chunk]) == 1 ? builder_.chunk_of(edge).held : kNone};
        };
        builder_.add_sends(1, edges, alone, [&](std::span<const int32_t> positions) {
            Place first{Buffer::kWork, kNone};
            for (const int32_t i : positions) {
                const Place to{Buffer::kWork, builder_.add_work_row()};
                add_inside(1, *terms_of_[edges[i].chunk], to);
                if (first.row == kNone) first = to;
            }
            return first;
        });
    }

    // Where sums of earlier nodes come first, this node's contributions are added up by themselves.
    void add_up_own_nodes() {
        for (const Terms& terms : routes_.terms) {
            if (terms.across_before == 0 || terms.inside_end - terms.inside_begin < 2) continue;
            work_row_[terms.chunk] = builder_.add_work_row();
            add_inside(1, terms, {Buffer::kWork, work_row_[terms.chunk]});
        }
    }

    void add_up(const Terms& terms) {
        const Place to{Buffer::kOwned, routes_.chunks[terms.chunk].owned};
        const int32_t own_node = terms.across_begin + terms.across_before;
        if (num_terms(terms) == 1) {
            const Place only = terms.across_begin < terms.across_end ? arrives_[1][terms.across_begin]
                                                                     : place_inside(terms, terms.inside_begin);
            if (only.buffer != Buffer::kOwned) builder_.copy(2, only, to);
            return;
        }
        for (int32_t i = terms.across_begin; i < own_node; ++i)
            builder_.add_term(2, to, arrives_[1][i]);
        if (work_row_[terms.chunk] != kNone) {
            builder_.add_term(2, to, {Buffer::kWork, work_row_[terms.chunk]});
        } else {
            add_inside(2, terms, to);
        }
        for (int32_t i = own_node; i < terms.across_end; ++i)
            builder_.add_term(2, to, arrives_[1][i]);
    }

    const Routes& routes_;
    Builder builder_;
    std::vector<const Terms*> terms_of_;  // by chunk
    std::vector<int32_t> work_row_;       // by chunk: the sum of its owner's node
    std::array<std::vector<Place>, kHops> arrives_;
};

}  // namespace

Program gather_program(const Routes& routes, const Viewpoint& from, int32_t num_ranks, bool converts) {
    Builder builder(routes, from, num_ranks);
    std::vector<int32_t> converted(converts ? routes.chunks.size() : 0, kNone);
    for (size_t i = 0; i < routes.chunks.size(); ++i) {
        const Chunk& chunk = routes.chunks[i];
        if (chunk.owned == kNone) continue;
        if (chunk.held != kNone) {
            builder.copy(0, {Buffer::kOwned, chunk.owned}, {Buffer::kHeld, chunk.held});
        } else if (converts) {
            converted[i] = builder.add_work_row();
            builder.copy(0, {Buffer::kOwned, chunk.owned}, {Buffer::kWork, converted[i]});
        }
    }
    const auto held = [&](const Edge& edge) { return Place{Buffer::kHeld, builder.chunk_of(edge).held}; };
    const auto owned = [&](const Edge& edge) {
        if (!converts) return Place{Buffer::kOwned, builder.chunk_of(edge).owned};
        return converted[edge.chunk] == kNone ? held(edge) : Place{Buffer::kWork, converted[edge.chunk]};
    };
    builder.add_sends(0, routes.gather_out[0], owned);
    for (int hop = 0; hop < kHops; ++hop) {
        const auto& edges = routes.gather_in[hop];
        const auto arrives = builder.add_receives(hop, edges, held);
        for (size_t i = 0; i < edges.size(); ++i)
            if (arrives[i].buffer != Buffer::kHeld) builder.copy(hop + 1, arrives[i], held(edges[i]));
        if (hop == 0) builder.add_sends(1, routes.gather_out[1], held);
    }
    return builder.take();
}

Program scatter_program(const Routes& routes, const Viewpoint& from, int32_t num_ranks, bool converts) {
    return Scatter(routes, from, num_ranks, converts).take();
}

}  // namespace moetrain::comm
