// Contract of check_sequence_plan: a step's plan keeps its rules. N sequences, I items, M ranks of all items, R ranks;
// see planner/sequences/plan.h. CPU alone.
#pragma once
#include "ops/common/checks.h"
#include "ops/common/fields.h"

namespace moetrain {

struct SequencePlanTensors {
    at::Tensor sequence_N3;     // int64
    at::Tensor round_I;         // int32
    at::Tensor offset_I1;       // int64
    at::Tensor member_N;        // int32
    at::Tensor rank_offset_I1;  // int64
    at::Tensor rank_M;          // int32
    at::Tensor offload_I;       // float64
    at::Tensor est_ms_I;        // float64
    at::Tensor rounds_R;        // int32
    using Fields = FieldTypes<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                              at::Tensor, at::Tensor>;
};

// Throws on the first rule that is broken.
void check_sequence_plan_cpu(const SequencePlanTensors& plan, int64_t block, int64_t capacity, int64_t num_layers);

}  // namespace moetrain
