#pragma once
#include "cpu/routing/select_experts.h"

namespace moetrain {

// Acc is float, or double for float64 logits. `select.weight_TK` is scratch.
template <typename Acc>
struct RouteForward {
    SelectForward<Acc> select;
    int32_t* token_N;
    Acc* weight_N;
    int32_t* offset_E1;  // over the true experts
    int32_t* place_TK;
};

template <typename Acc>
void route_kernel(const SelectOptions& options, const RouteForward<Acc>& io);

extern template void route_kernel(const SelectOptions&, const RouteForward<float>&);
extern template void route_kernel(const SelectOptions&, const RouteForward<double>&);

}  // namespace moetrain
