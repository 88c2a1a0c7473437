// What the up-projection and the gradient of the hidden rows do with their accumulators.
//
// H [N, parts * F] holds an expert's pre-activations with their bias: the gate half, then the up half (one part without
// a gate), in the order of w_in's rows, so that dX = dH · W_in and dW_in = dHᵀ · X take whole tiles of either. A [N, F]
// holds the pair's routing weight times its activation, rounded once; with it every later sum over pairs is plain.
#pragma once

#include <cstdint>

#include "cuda/expert_mlp/activation.h"
#include "cuda/expert_mlp/problem.h"
#include "cuda/grouped_gemm/epilogue.h"

namespace moetrain::experts {

using namespace gemm;

// Two columns of a row, or of a bias.
struct Pair {
    float low;
    float high;
};
__device__ inline Pair unpack(uint32_t word) { return {low_half(word), high_half(word)}; }

// Stores H and A from the products X · W_inᵀ.
template <bool kGated>
struct UpEpilogue {
    static constexpr int kNumColumnBlocks = kGated ? 2 : 1;

    Bf16* h;  // rows h_stride apart; null: not kept
    Bf16* a;  // [N, F]; null: not wanted
    int64_t h_stride;
    int hidden;           // F, a multiple of 8
    const float* weight;  // [N]
    const Bf16* bias;     // [slots, parts * F], slots bias_stride apart; null: none
    int64_t bias_stride;
    UngatedActivation activation;  // where not kGated

    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
        constexpr int kNumSteps = kTileN / kNumColumnBlocks / kColumnsPerStep;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            const bool is_valid = row < position.row_end;
            const float row_weight = is_valid ? weight[row] : 0.0f;
#pragma unroll
            for (int step = 0; step < kNumSteps; ++step) {
                const int column = position.column + step * kColumnsPerStep;
                Words activated;
                if constexpr (kGated)
                    finish_gated(accumulators, position, half, step, row_weight, activated);
                else
                    finish_ungated(accumulators, position, half, step, row_weight, activated);
                if (a != nullptr)
                    store_columns(a + static_cast<int64_t>(row) * hidden, column, hidden, is_valid, position.quad_lane,
                                  activated);
            }
        }
    }

 private:
    __device__ Pair bias_of(const FragmentPosition& position, int part, int column) const {
        if (bias == nullptr || column >= hidden) return {0, 0};
        return unpack(*reinterpret_cast<const uint32_t*>(bias + position.slot * bias_stride + part * hidden + column));
    }

    __device__ void store_h(const FragmentPosition& position, int half, int step, int part, Words& words) const {
        if (h == nullptr) return;
        const int row = position.row + 8 * half;
        store_columns(h + row * h_stride + part * hidden, position.column + step * kColumnsPerStep, hidden,
                      row < position.row_end, position.quad_lane, words);
    }

    template <int kSize>
    __device__ void finish_gated(const float (&accumulators)[kSize], const FragmentPosition& position, int half,
                                 int step, float row_weight, Words& activated) const {
        Words gates;
        Words ups;
#pragma unroll
        for (int i = 0; i < kWordsPerStep; ++i) {
            const int octet = step * kWordsPerStep + i;
            const int column = position.column + 8 * octet + 2 * position.quad_lane;
            const float* gate = pair_of(accumulators, half, octet);
            const float* up = gate + kSize / 2;  // the second half of the tile
            const Pair gate_bias = bias_of(position, 0, column);
            const Pair up_bias = bias_of(position, 1, column);
            const Pair g{gate[0] + gate_bias.low, gate[1] + gate_bias.high};
            const Pair u{up[0] + up_bias.low, up[1] + up_bias.high};
            gates[i] = ptx::pack_bf16x2(g.low, g.high);
            ups[i] = ptx::pack_bf16x2(u.low, u.high);
            activated[i] = ptx::pack_bf16x2(row_weight * swiglu(g.low, u.low), row_weight * swiglu(g.high, u.high));
        }
        store_h(position, half, step, 0, gates);
        store_h(position, half, step, 1, ups);
    }

    template <int kSize>
    __device__ void finish_ungated(const float (&accumulators)[kSize], const FragmentPosition& position, int half,
                                   int step, float row_weight, Words& activated) const {
        Words kept;
#pragma unroll
        for (int i = 0; i < kWordsPerStep; ++i) {
            const int octet = step * kWordsPerStep + i;
            const float* sums = pair_of(accumulators, half, octet);
            const Pair own_bias = bias_of(position, 0, position.column + 8 * octet + 2 * position.quad_lane);
            const Pair x{sums[0] + own_bias.low, sums[1] + own_bias.high};
            kept[i] = ptx::pack_bf16x2(x.low, x.high);
            activated[i] = ptx::pack_bf16x2(row_weight * activate(activation, x.low).value,
                                            row_weight * activate(activation, x.high).value);
        }
        store_h(position, half, step, 0, kept);
    }
};

inline UngatedActivation ungated(Activation activation) {
    return activation == Activation::kRelu2 ? UngatedActivation::kRelu2 : UngatedActivation::kGelu;
}

template <bool kGated>
UpEpilogue<kGated> make_up_epilogue(const UpProjection& up) {
    return {.h = up.h,
            .a = up.a,
            .h_stride = up.h_stride,
            .hidden = static_cast<int>(up.product.num_columns / UpEpilogue<kGated>::kNumColumnBlocks),
            .weight = up.weight,
            .bias = up.bias,
            .bias_stride = up.bias_stride,
            .activation = ungated(up.activation)};
}

// From dA' = dY · W_out and the stored H: stores dH and A, and the tile's part of each row's <dA', activation>, the
// gradient of its routing weight. dH may be H itself.
template <bool kGated>
struct HiddenGradEpilogue {
    static constexpr int kNumColumnBlocks = 1;

    const Bf16* h;  // rows h_stride apart
    int64_t h_stride;
    Bf16* dh;  // rows dh_stride apart
    int64_t dh_stride;
    Bf16* a;              // [N, F]
    int hidden;           // F, a multiple of 8
    const float* weight;  // [N]
    float* weight_grad;   // [parts of F, N]
    int64_t num_pairs;    // N
    UngatedActivation activation;

    template <int kTileN>
    __device__ void operator()(const float (&accumulators)[kTileN / 2], const FragmentPosition& position) const {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = position.row + 8 * half;
            const bool is_valid = row < position.row_end;
            const float row_weight = is_valid ? weight[row] : 0.0f;
            float product = 0;
#pragma unroll
            for (int step = 0; step < kTileN / kColumnsPerStep; ++step) {
                if constexpr (kGated)
                    product += finish_gated(accumulators, position, half, step, row_weight);
                else
                    product += finish_ungated(accumulators, position, half, step, row_weight);
            }
            product = ptx::sum_over_lanes<4>(product);
            if (is_valid && position.quad_lane == 0) weight_grad[position.part_idx * num_pairs + row] = product;
        }
    }

 private:
    // Columns beyond F have products of zeros and an H of zeros: they add nothing.
    template <int kSize>
    __device__ float finish_gated(const float (&accumulators)[kSize], const FragmentPosition& position, int half,
                                  int step, float row_weight) const {
        const int row = position.row + 8 * half;
        const bool is_valid = row < position.row_end;
        const int column = position.column + step * kColumnsPerStep;
        const Bf16* h_row = h + row * h_stride;
        Words gates;
        Words ups;
        Words activated;
        load_columns(h_row, column, hidden, is_valid, position.quad_lane, gates);
        load_columns(h_row + hidden, column, hidden, is_valid, position.quad_lane, ups);
        float product = 0;
#pragma unroll
        for (int i = 0; i < kWordsPerStep; ++i) {
            const float* da = pair_of(accumulators, half, step * kWordsPerStep + i);
            const Pair g = unpack(gates[i]);
            const Pair u = unpack(ups[i]);
            const GatedGradient low = swiglu_gradient(g.low, u.low, row_weight * da[0]);
            const GatedGradient high = swiglu_gradient(g.high, u.high, row_weight * da[1]);
            product += da[0] * low.activated + da[1] * high.activated;
            gates[i] = ptx::pack_bf16x2(low.dgate, high.dgate);
            ups[i] = ptx::pack_bf16x2(low.dup, high.dup);
            activated[i] = ptx::pack_bf16x2(row_weight * low.activated, row_weight * high.activated);
        }
        Bf16* dh_row = dh + row * dh_stride;
        store_columns(dh_row, column, hidden, is_valid, position.quad_lane, gates);
        store_columns(dh_row + hidden, column, hidden, is_valid, position.quad_lane, ups);
        store_columns(a + static_cast<int64_t>(row) * hidden, column, hidden, is_valid, position.quad_lane, activated);
        return product;
    }

    template <int kSize>
    __device__ float finish_ungated(const float (&accumulators)[kSize], const FragmentPosition& position, int half,
                                    int step, float row_weight) const {
        const int row = position.row + 8 * half;
        const bool is_valid = row < position.row_end;
        const int column = position.column + step * kColumnsPerStep;
        Words hidden_words;
        Words activated;
        load_columns(h + row * h_stride, column, hidden, is_valid, position.quad_lane, hidden_words);
        float product = 0;
#pragma unroll
        for (int i = 0; i < kWordsPerStep; ++i) {
            const float* da = pair_of(accumulators, half, step * kWordsPerStep + i);
            const Pair x = unpack(hidden_words[i]);
            const ValueAndSlope low = activate(activation, x.low);
            const ValueAndSlope high = activate(activation, x.high);
            product += da[0] * low.value + da[1] * high.value;
            hidden_words[i] = ptx::pack_bf16x2(row_weight * da[0] * low.slope, row_weight * da[1] * high.slope);
            activated[i] = ptx::pack_bf16x2(row_weight * low.value, row_weight * high.value);
        }
        store_columns(dh + row * dh_stride, column, hidden, is_valid, position.quad_lane, hidden_words);
        store_columns(a + static_cast<int64_t>(row) * hidden, column, hidden, is_valid, position.quad_lane, activated);
        return product;
    }
};

template <bool kGated>
HiddenGradEpilogue<kGated> make_hidden_grad_epilogue(const HiddenGrad& grad) {
    return {.h = grad.h,
            .h_stride = grad.h_stride,
            .dh = grad.dh,
            .dh_stride = grad.dh_stride,
            .a = grad.a,
            .hidden = static_cast<int>(grad.product.num_columns),
            .weight = grad.weight,
            .weight_grad = grad.weight_grad,
            .num_pairs = grad.num_pairs,
            .activation = ungated(grad.activation)};
}

}  // namespace moetrain::experts
