#include "cpu/routing/route.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/routing/route.h"
#include "ops/routing/select_tensors.h"

namespace moetrain {
namespace {

template <typename Acc>
RouteOutputs route_forward(const SelectOptions& o, const SelectInput& in) {
    const SelectTensors select = new_select_tensors(o, in);
    const auto ints = select.expert_id_TK.options();
    auto token_N = new_empty({o.num_tokens * o.top_k}, ints);
    auto weight_N = new_empty({o.num_tokens * o.top_k}, select.weight_TK.options());
    auto offset_E1 = new_empty({o.num_true() + 1}, ints);
    auto place_TK = new_empty({o.num_tokens, o.top_k}, ints);
    route_kernel<Acc>(o, {
                             .select = select_forward_of<Acc>(select, in),
                             .token_N = token_N.mutable_data_ptr<int32_t>(),
                             .weight_N = weight_N.mutable_data_ptr<Acc>(),
                             .offset_E1 = offset_E1.mutable_data_ptr<int32_t>(),
                             .place_TK = place_TK.mutable_data_ptr<int32_t>(),
                         });
    return {token_N,  weight_N,           offset_E1,       select.expert_id_TK,
            place_TK, select.prob_sum_GE, select.count_GE, select.bad_1};
}

}  // namespace

RouteOutputs route_cpu(const SelectInput& in) {
    const SelectOptions o = check_route(in);
    check_segments("route", in.masks, in.num_segments);
    const auto run = in.logits_TE.scalar_type() == at::kDouble ? route_forward<double> : route_forward<float>;
    return run(o, in);
}

at::Tensor route_backward_cpu(const SelectGradients& in, const at::Tensor& place_TK, const WeightOptions& how) {
    constexpr auto op = "route_backward";
    const SelectOptions o = check_route_backward(in, place_TK, how);
    check_segments(op, how.masks, o.num_segments);
    check_ids(op, in.expert_id_TK, o.num_true());
    check_places(op, place_TK);
    auto dlogits_TE = new_empty(in.logits_TE.sizes(), in.logits_TE.options());
    const auto run = in.dweight.scalar_type() == at::kDouble ? run_select_backward<double> : run_select_backward<float>;
    run(o, in, place_TK, how.masks, dlogits_TE);
    return dlogits_TE;
}

}  // namespace moetrain
