#include <ATen/Parallel.h>

#include <vector>

#include "cpu/common/tasks.h"
#include "ops/common/isa_dtype.h"
#include "ops/common/optional.h"
#include "ops/common/tensors.h"
#include "ops/expert_mlp/expert_mlp.h"

namespace moetrain {
namespace {

using mlp::Kernels;
using mlp::Matrix;
using mlp::Problem;

// A task of pairs or rows at most, and at least so many per thread that the last one does not hold up the rest.
constexpr int64_t kPairsPerTask = 512;
constexpr int64_t kTasksPerThread = 6;
// Pairs whose gradients of H exist at a time in the backward pass, or so many per thread where that is more. Fewer
// would cost time: more than one wave needs dx in fp32.
constexpr int64_t kPairsPerWave = 8192;
constexpr int64_t kPairsPerWaveAndThread = 2048;

// [R, D], [slots, D, F], [slots, parts, F, D]: strides of what comes before the last dimension.
Matrix matrix(const at::Tensor& t) {
    Matrix m{.data = t.data_ptr()};
    if (t.dim() >= 2) m.row_stride = t.stride(-2);
    if (t.dim() >= 3) m.slot_stride = t.stride(0);
    if (t.dim() == 4) m.part_stride = t.stride(1);
    return m;
}

// [slots, D] or [slots, parts, F].
Matrix bias_matrix(const at::Tensor& t) {
    return {.data = t.data_ptr(), .slot_stride = t.stride(0), .part_stride = t.dim() == 3 ? t.stride(1) : 0};
}

// One call: the problem, and what it points to.
struct Call {
    const ExpertMlp& in;
    Problem problem;
    Kernels kernels;
    std::vector<int32_t> slot_offset, group_of_slot;

    explicit Call(const ExpertMlp& inputs) : in(inputs), kernels(isa::kernels_in_use(dtype_of(inputs.x_RD)).mlp) {
        Problem& p = problem;
        p.num_rows = in.x_RD.size(0);
        p.width = in.width();
        p.hidden = in.hidden();
        p.num_groups = p.group_end = in.offset_E1.size(0) - 1;
        p.num_slots = in.num_slots();
        p.num_pairs = in.offset_E1.const_data_ptr<int32_t>()[p.num_groups];
        p.activation = in.gated()                ? mlp::Activation::kSwiglu
                       : in.activation == "gelu" ? mlp::Activation::kGelu
                                                 : mlp::Activation::kRelu2;
        p.row = in.row_N.const_data_ptr<int32_t>();
        p.weight = in.weight_N.const_data_ptr();
        p.offset = in.offset_E1.const_data_ptr<int32_t>();
        p.slot = data_or_null<int32_t>(in.slot_E);
        p.x = matrix(in.x_RD);
        p.w_in = matrix(in.w_in);
        p.w_out = matrix(in.w_out);
        if (in.b_in) p.b_in = bias_matrix(*in.b_in);
        if (in.b_out) p.b_out = bias_matrix(*in.b_out);
        p.rows_ascend = rows_ascend(p);
        group_slots();
    }

    static bool rows_ascend(const Problem& p) {
        for (int64_t e = 0; e < p.num_groups; ++e) {
            for (int64_t n = p.offset[e] + 1; n < p.offset[e + 1]; ++n) {
                if (p.row[n - 1] >= p.row[n]) return false;
            }
        }
        return true;
    }

    int64_t pairs_of(int64_t slot) const {
        int64_t pairs = 0;
        for (int64_t i = slot_offset[slot]; i < slot_offset[slot + 1]; ++i)
            pairs += problem.offset[group_of_slot[i] + 1] - problem.offset[group_of_slot[i]];
        return pairs;
    }

    void group_slots() {
        Problem& p = problem;
        slot_offset.assign(p.num_slots + 1, 0);
        group_of_slot.resize(p.num_groups);
        for (int64_t e = 0; e < p.num_groups; ++e)
            ++slot_offset[p.slot_of(e) + 1];
        for (int64_t s = 0; s < p.num_slots; ++s)
            slot_offset[s + 1] += slot_offset[s];
        std::vector<int32_t> next(slot_offset.begin(), slot_offset.end() - 1);
        for (int64_t e = 0; e < p.num_groups; ++e)
            group_of_slot[next[p.slot_of(e)]++] = static_cast<int32_t>(e);
        for (int64_t s = 0; s < p.num_slots; ++s)
            p.most_pairs = std::max(p.most_pairs, pairs_of(s));
        p.slot_offset = slot_offset.data();
        p.group_of_slot = group_of_slot.data();
    }

    int64_t first_pair() const { return problem.offset[problem.group_begin]; }
    int64_t num_pairs() const { return problem.offset[problem.group_end] - first_pair(); }

    // Rows for the pairs at work. Products may read past the end: those rows are there, and stay unused.
    at::Tensor pair_rows(int64_t columns) const {
        return new_empty({num_pairs() + mlp::kSlackRows, columns}, in.x_RD.options());
    }
    Matrix pair_matrix(const at::Tensor& t) const {
        Matrix m = matrix(t);
        m.first_row = first_pair();
        return m;
    }

    // Cuts the groups into runs of about kPairsPerWave pairs. A slot that several groups share would get its
    // gradient in pieces: then there is one run.
    std::vector<int64_t> cut_waves() const {
        const Problem& p = problem;
        for (int64_t s = 0; s < p.num_slots; ++s) {
            if (slot_offset[s + 1] - slot_offset[s] > 1) return {0, p.num_groups};
        }
        std::vector<int64_t> begins{0};
        const int64_t limit = std::max(kPairsPerWave, kPairsPerWaveAndThread * at::get_num_threads());
        for (int64_t e = 1; e < p.num_groups; ++e) {
            if (p.offset[e + 1] - p.offset[begins.back()] > limit) begins.push_back(e);
        }
        begins.push_back(p.num_groups);
        return begins;
    }

    // Each thread that takes part has one scratch for all its tasks.
    template <typename Run>
    void run(int64_t num_tasks, const Run& run_task) const {
        const int64_t bytes = kernels.scratch_bytes(problem);
        run_tasks(num_tasks, [&] {
            const auto scratch = new_empty({bytes}, at::TensorOptions().dtype(at::kByte));
            return [&run_task, scratch](int64_t task) { run_task(task, scratch.data_ptr()); };
        });
    }

    struct PairTask {
        int64_t group, begin, end;
    };
    std::vector<PairTask> pair_tasks() const {
        const Problem& p = problem;
        const int64_t spread = num_pairs() / (kTasksPerThread * at::get_num_threads());
        const int64_t limit =
            at::get_num_threads() == 1 ? mlp::kPairsPerBlock : std::clamp<int64_t>(spread, 96, kPairsPerTask);
        std::vector<PairTask> tasks;
        for (int64_t e = p.group_begin; e < p.group_end; ++e) {
            const int64_t size = p.offset[e + 1] - p.offset[e];
            const int64_t pieces = (size + limit - 1) / limit;
            for (int64_t i = 0; i < pieces; ++i)
                tasks.push_back({e, p.offset[e] + size * i / pieces, p.offset[e] + size * (i + 1) / pieces});
        }
        return tasks;
    }
    void run_pairs(void (*kernel)(const Problem&, void*, int64_t, int64_t, int64_t)) const {
        const auto tasks = pair_tasks();
        run(static_cast<int64_t>(tasks.size()),
            [&](int64_t i, void* scratch) { kernel(problem, scratch, tasks[i].group, tasks[i].begin, tasks[i].end); });
    }

    // The backward pass of the groups at work; recomputes H where it was not kept.
    void run_wave(const OptionalTensor& h_NP) {
        Problem& p = problem;
        const auto dh = pair_rows(p.hidden_columns());
        p.dh = pair_matrix(dh);
        p.h = h_NP ? matrix(*h_NP) : p.dh;
        p.a = {};
        if (!h_NP) run_pairs(kernels.up);
        const auto a = pair_rows(p.activated_columns());
        p.a = pair_matrix(a);
        run_pairs(kernels.hidden_grad);
        run_slots(p.hidden, kernels.w_out_grad);
        run_slots(p.width, kernels.w_in_grad);
        run_rows(kernels.input_grad);
    }

    // Rows times panels of columns; every row's sum is one task's, so the cut does not show in the result.
    void run_rows(void (*kernel)(const Problem&, void*, int64_t, int64_t, int64_t)) const {
        const int64_t panels = (problem.width + mlp::kPanel - 1) / mlp::kPanel;
        const int64_t wanted = at::get_num_threads() == 1 ? 1 : kTasksPerThread * at::get_num_threads();
        const int64_t pieces = std::max((problem.num_rows + mlp::kRowsPerTask - 1) / mlp::kRowsPerTask,
                                        std::min((wanted + panels - 1) / panels, problem.num_rows / 64 + 1));
        run(problem.num_rows == 0 ? 0 : pieces * panels, [&](int64_t i, void* scratch) {
            const int64_t piece = i / panels;
            kernel(problem, scratch, problem.num_rows * piece / pieces, problem.num_rows * (piece + 1) / pieces,
                   i % panels);
        });
    }

    struct SlotTask {
        int64_t slot, begin, end;
    };
    // Slots of the groups at work; those of no group go with the first.
    bool at_work(int64_t slot) const {
        if (slot_offset[slot] == slot_offset[slot + 1]) return problem.group_begin == 0;
        const int32_t group = group_of_slot[slot_offset[slot]];
        return group >= problem.group_begin && group < problem.group_end;
    }
    // A slot with more than its share of the pairs is cut by columns, which changes no sum.
    void run_slots(int64_t columns, void (*kernel)(const Problem&, void*, int64_t, int64_t, int64_t)) const {
        std::vector<SlotTask> tasks;
        const int64_t threads = at::get_num_threads();
        const int64_t share = threads == 1 ? num_pairs() : num_pairs() / (kTasksPerThread * threads) + 1;
        for (int64_t s = 0; s < problem.num_slots; ++s) {
            if (!at_work(s)) continue;
            const int64_t pairs = pairs_of(s);
            const int64_t panels = (columns + mlp::kPanel - 1) / mlp::kPanel;
            const int64_t fewest = (columns + mlp::kColumnsPerTask - 1) / mlp::kColumnsPerTask;
            const int64_t pieces = std::clamp(share == 0 ? 1 : pairs / share, fewest, panels);
            for (int64_t i = 0; i < pieces; ++i) {
                tasks.push_back(
                    {s, panels * i / pieces * mlp::kPanel, std::min(panels * (i + 1) / pieces * mlp::kPanel, columns)});
            }
        }
        run(static_cast<int64_t>(tasks.size()),
            [&](int64_t i, void* scratch) { kernel(problem, scratch, tasks[i].slot, tasks[i].begin, tasks[i].end); });
    }
};

}  // namespace

std::tuple<at::Tensor, at::Tensor> expert_mlp_cpu(const ExpertMlp& in, bool save_h) {
    check_expert_mlp(in);
    check_expert_mlp_values(in);
    Call call(in);
    Problem& p = call.problem;
    auto y_RD = new_empty(in.x_RD.sizes(), in.x_RD.options());
    auto h_NP = new_empty({save_h ? in.row_N.size(0) : 0, p.hidden_columns()}, in.x_RD.options());
    if (!save_h) h_NP = new_empty({0}, in.x_RD.options());
    const auto a = call.pair_rows(p.activated_columns());
    p.y = matrix(y_RD);
    p.a = matrix(a);
    if (save_h) p.h = matrix(h_NP);
    call.run_pairs(call.kernels.up);
    call.run_rows(call.kernels.down);
    return {y_RD, h_NP};
}

ExpertMlpGradients expert_mlp_backward_cpu(const at::Tensor& dy_RD, ExpertMlpTensors tensors,
                                           const OptionalTensor& h_NP, std::string_view activation) {
    const ExpertMlp in{std::move(tensors), activation};
    check_expert_mlp_backward(in, dy_RD, h_NP);
    check_expert_mlp_values(in);
    Call call(in);
    Problem& p = call.problem;

    const auto options = in.x_RD.options();
    auto dx_RD = new_empty(in.x_RD.sizes(), options);
    auto dweight_N = new_empty(in.weight_N.sizes(), in.weight_N.options());
    dweight_N.narrow(0, p.num_pairs, dweight_N.size(0) - p.num_pairs).zero_();
    auto dw_in = new_empty(in.w_in.sizes(), options);
    auto dw_out = new_empty(in.w_out.sizes(), options);
    auto db_in = new_empty(in.b_in ? in.b_in->sizes() : at::IntArrayRef{0}, options);
    auto db_out = new_empty(in.b_out ? in.b_out->sizes() : at::IntArrayRef{0}, options);
    p.dy = matrix(dy_RD);
    p.dweight = dweight_N.data_ptr();
    p.dw_in = matrix(dw_in);
    p.dw_out = matrix(dw_out);
    if (in.b_in) p.db_in = bias_matrix(db_in);
    if (in.b_out) p.db_out = bias_matrix(db_out);

    const auto waves = call.cut_waves();
    at::Tensor dx_sums;
    if (waves.size() > 2) {
        dx_sums = new_zeros({p.num_rows, mlp::round_up(p.width, mlp::kPanel)}, in.weight_N.options());
        p.dx_sums = matrix(dx_sums);
    } else {
        p.dx = matrix(dx_RD);
    }
    for (size_t wave = 0; wave + 1 < waves.size(); ++wave) {
        p.group_begin = waves[wave];
        p.group_end = waves[wave + 1];
        call.run_wave(h_NP);
    }
    if (dx_sums.defined()) dx_RD.copy_(dx_sums.narrow(1, 0, p.width));
    return {dx_RD, dweight_N, dw_in, dw_out, db_in, db_out};
}

}  // namespace moetrain
