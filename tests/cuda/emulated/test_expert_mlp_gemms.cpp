// The up-projection and the gradient of the hidden rows on Hopper, under emulation.
#include <vector>

#include "expert_mlp_case.h"
#include "launch_sm90.h"

namespace moetrain::test {
namespace {

using namespace moetrain::sm90;

constexpr GemmShape kUp{.tile_m = 128, .tile_n = 256, .num_stages = 2, .uses_cp_async = true};
constexpr GemmShape kUpOfFew{
    .tile_m = 64, .tile_n = 128, .num_stages = 3, .uses_cp_async = true, .schedule = Schedule::kPingPong};
constexpr GemmShape kGrad{.tile_m = 128, .tile_n = 128, .num_stages = 2, .major_b = Major::kMn, .uses_cp_async = true};
constexpr GemmShape kGradPingPong{.tile_m = 64,
                                  .tile_n = 64,
                                  .num_stages = 3,
                                  .major_b = Major::kMn,
                                  .uses_cp_async = true,
                                  .schedule = Schedule::kPingPong};

}  // namespace
}  // namespace moetrain::test

int main() {
    using namespace moetrain::experts;
    using namespace moetrain::sm90;
    using namespace moetrain::test;
    using enum UngatedActivation;
    const std::vector<int> uneven{37, 0, 130, 1};
    Runner runner;
    const auto check = [&](const char* name, const auto& function, const Case& test) {
        check_all_timings(runner, name, [&](auto timing, uint64_t seed) { function(test, timing, seed); });
    };
    check("up, SwiGLU, bias, F beyond a tile", check_up<Hopper<kUp>, true>,
          {.group_sizes = uneven, .width = 136, .hidden = 168, .has_bias = true});
    check("up, SwiGLU, H alone", check_up<Hopper<kUpOfFew>, true>,
          {.group_sizes = {65, 1}, .width = 64, .hidden = 72, .stores_a = false});
    check("up, SwiGLU, A alone, ping-pong", check_up<Hopper<kUpOfFew>, true>,
          {.group_sizes = {66, 0, 1}, .width = 72, .hidden = 64, .num_blocks = 1, .stores_h = false});
    check("up, GELU, bias, ping-pong", check_up<Hopper<kUpOfFew>, false>,
          {.group_sizes = {3, 0, 64}, .width = 72, .hidden = 200, .has_bias = true});
    check("up, ReLU squared", check_up<Hopper<kUpOfFew>, false>,
          {.group_sizes = {1, 66}, .width = 64, .hidden = 136, .activation = kRelu2});
    check("hidden gradient, SwiGLU, F beyond a tile", check_hidden_grad<Hopper<kGrad>, true>,
          {.group_sizes = uneven, .width = 136, .hidden = 168});
    check("hidden gradient, SwiGLU, ping-pong, in place", check_hidden_grad<Hopper<kGradPingPong>, true, true>,
          {.group_sizes = {65, 0, 1}, .width = 72, .hidden = 104, .num_blocks = 1});
    check("hidden gradient, GELU, ping-pong", check_hidden_grad<Hopper<kGradPingPong>, false>,
          {.group_sizes = {0, 66}, .width = 64, .hidden = 72});
    check("hidden gradient, ReLU squared, in place", check_hidden_grad<Hopper<kGradPingPong>, false, true>,
          {.group_sizes = {1, 20}, .width = 64, .hidden = 64, .activation = kRelu2});
    return runner.exit_code();
}
