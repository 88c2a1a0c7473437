// The pass that selects also counts each chunk's choices. A scan over (expert, chunk) gives every chunk its first place
// in every expert, and a second pass writes the chunk's pairs in order. So the result is the stable sort, whatever the
// number of threads and of chunks. group_pairs.cpp draws an example: its runs are chunks here.
#include "cpu/routing/route.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

namespace moetrain {
namespace {

// Turns choices [chunk, G, E] into first places [chunk, true experts + 1], the last for choices of no true expert, and
// fills the experts' offsets.
std::vector<int32_t> first_places(const SelectOptions& o, const std::vector<int32_t>& choice_CGE, int64_t chunk_size,
                                  int32_t* offset_E1) {
    const int64_t num_true = o.num_true();
    const int64_t num_buckets = num_true + 1;
    const int64_t num_chunks = (o.num_tokens + chunk_size - 1) / chunk_size;
    std::vector<int32_t> place(num_chunks * num_buckets, 0);
    std::vector<int32_t> next(num_buckets, 0);
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        int32_t* count = place.data() + chunk * num_buckets;
        for (int64_t g = 0; g < o.num_segments; ++g) {
            const int32_t* choice = choice_CGE.data() + (chunk * o.num_segments + g) * o.num_experts;
            for (int64_t e = 0; e < num_true; ++e)
                count[e] += choice[e];
        }
        for (int64_t e = 0; e < num_true; ++e)
            next[e] += count[e];
    }
    int32_t total = 0;
    for (int64_t e = 0; e < num_buckets; ++e) {
        offset_E1[e] = total;
        total += next[e];  // 0 for the last bucket
        next[e] = offset_E1[e];
    }
    for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
        const int64_t tokens = std::min(chunk_size, o.num_tokens - chunk * chunk_size);
        auto nowhere = static_cast<int32_t>(tokens * o.top_k);
        int32_t* count = place.data() + chunk * num_buckets;
        for (int64_t e = 0; e < num_true; ++e) {
            const int32_t size = count[e];
            count[e] = next[e];
            next[e] += size;
            nowhere -= size;
        }
        count[num_true] = next[num_true];
        next[num_true] += nowhere;
    }
    return place;
}

template <typename Acc>
void write_pairs(const SelectOptions& o, const RouteForward<Acc>& io, int64_t begin, int64_t end, int32_t* place) {
    const auto num_true = static_cast<int32_t>(o.num_true());
    for (int64_t t = begin; t < end; ++t) {
        for (int64_t p = t * o.top_k; p < (t + 1) * o.top_k; ++p) {
            const int32_t id = io.select.expert_id_TK[p];
            const int32_t n = place[id < 0 ? num_true : id]++;
            io.token_N[n] = static_cast<int32_t>(t);
            io.weight_N[n] = io.select.weight_TK[p];
            io.place_TK[p] = n;
        }
    }
}

}  // namespace

template <typename Acc>
void route_kernel(const SelectOptions& o, const RouteForward<Acc>& io) {
    const std::vector<int32_t> choice_CGE = select_experts_kernel(o, io.select);
    const int64_t size = select_chunk_size(o);
    const int64_t num_chunks = (o.num_tokens + size - 1) / size;
    std::vector<int32_t> place = first_places(o, choice_CGE, size, io.offset_E1);
    at::parallel_for(0, num_chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
            write_pairs(o, io, chunk * size, std::min((chunk + 1) * size, o.num_tokens),
                        place.data() + chunk * (o.num_true() + 1));
        }
    });
}

template void route_kernel(const SelectOptions&, const RouteForward<float>&);
template void route_kernel(const SelectOptions&, const RouteForward<double>&);

}  // namespace moetrain
