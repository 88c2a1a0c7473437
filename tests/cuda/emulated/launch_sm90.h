// Hopper's grouped GEMMs under emulation, for tests that are written over any architecture.
#pragma once

#include "cuda/grouped_gemm/sm90/arguments.h"
#include "gemm_case.h"

namespace moetrain::test {

template <sm90::GemmShape kShape>
struct Hopper {
    using Config = sm90::GemmConfig<kShape>;
    using Storage = sm90::PipelineStorage<Config>;
    static constexpr bool kGathers = Config::kUsesCpAsync;
    static constexpr bool kIsMnMajor = Config::kMajorB == Major::kMn;

    static int num_weight_grad_parts(int hidden) { return gemm::ceil_div(hidden, Config::kTileN); }

    template <class Epilogue>
    static void run_gemm(const gemm::GroupedGemmProblem& problem, const Epilogue& epilogue, const GridOptions& grid) {
        const auto arguments = sm90::make_arguments<Config>(problem, epilogue);
        emulation::run_grid(with_block<Config, Storage>(grid),
                            [&] { sm90::grouped_gemm_kernel<Config, Epilogue>(arguments); });
    }

    template <class Epilogue>
    static void run_varlen_k(const gemm::VarlenKProblem& problem, const Epilogue& epilogue, const GridOptions& grid) {
        const auto arguments = sm90::make_varlen_k_arguments<Config>(problem, epilogue);
        emulation::run_grid(with_block<Config, Storage>(grid),
                            [&] { sm90::varlen_k_gemm_kernel<Config, Epilogue>(arguments); });
    }
};

}  // namespace moetrain::test
