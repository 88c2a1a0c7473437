// Ampere's grouped GEMMs under emulation, for tests that are written over any architecture.
#pragma once

#include "cuda/grouped_gemm/sm80/arguments.h"
#include "gemm_case.h"

namespace moetrain::test {

template <sm80::GemmShape kShape, bool kGathers_ = true>
struct Ampere {
    using Config = sm80::GemmConfig<kShape>;
    using Storage = sm80::PipelineStorage<Config>;
    static constexpr bool kGathers = kGathers_;
    static constexpr bool kIsMnMajor = Config::kMajorB == Major::kMn;

    static int num_weight_grad_parts(int hidden) { return Config::kWarpsN * gemm::ceil_div(hidden, Config::kTileN); }

    template <class Epilogue>
    static void run_gemm(const gemm::GroupedGemmProblem& problem, const Epilogue& epilogue, const GridOptions& grid) {
        const auto arguments = sm80::make_arguments<Config>(problem, epilogue);
        emulation::run_grid(with_block<Config, Storage>(grid),
                            [&] { sm80::grouped_gemm_kernel<Config, Epilogue>(arguments); });
    }

    template <class Epilogue>
    static void run_varlen_k(const gemm::VarlenKProblem& problem, const Epilogue& epilogue, const GridOptions& grid) {
        const auto arguments = sm80::make_varlen_k_arguments<Config>(problem, epilogue);
        emulation::run_grid(with_block<Config, Storage>(grid),
                            [&] { sm80::varlen_k_gemm_kernel<Config, Epilogue>(arguments); });
    }
};

}  // namespace moetrain::test
