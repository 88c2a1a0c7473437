#include "planner/anderson.h"

#include <algorithm>
#include <utility>

namespace moetrain::planner {
namespace {

constexpr double kRidge = 1e-6;  // steps that are nearly the same say nothing new

// Eight sums in turn, so that the order is the same for any width of the machine's vectors.
double dot(const std::vector<float>& a, const std::vector<float>& b) {
    constexpr size_t kSums = 8;
    std::array<float, kSums> sums{};
    const size_t whole = a.size() / kSums * kSums;
    for (size_t i = 0; i < whole; i += kSums) {
        for (size_t j = 0; j < kSums; ++j)
            sums[j] += a[i + j] * b[i + j];
    }
    double total = 0;
    for (const float sum : sums)
        total += sum;
    for (size_t i = whole; i < a.size(); ++i)
        total += a[i] * b[i];
    return total;
}

}  // namespace

Anderson::Anderson(size_t size) : last_x_(size), last_rise_(size) {
    for (auto* history : {&moved_, &changed_}) {
        for (auto& each : *history)
            each.resize(size);
    }
}

void Anderson::restart() { taken_ = 0; }

void Anderson::remember(const std::vector<float>& x, const std::vector<float>& rise) {
    if (taken_ > 0) {
        const int place = (taken_ - 1) % kDepth;
        for (size_t i = 0; i < x.size(); ++i) {
            moved_[place][i] = x[i] - last_x_[i];
            changed_[place][i] = rise[i] - last_rise_[i];
        }
        for (int j = 0; j < std::min(taken_, kDepth); ++j)
            gram_[place][j] = gram_[j][place] = dot(changed_[place], changed_[j]);
    }
    last_x_ = x;
    last_rise_ = rise;
    ++taken_;
}

// Solves gram * mix = changed . rise by elimination; gram is positive definite with its ridge.
Anderson::Vector Anderson::mix(const std::vector<float>& rise) const {
    const int known = std::min(taken_ - 1, kDepth);
    std::array<Vector, kDepth> a = gram_;
    Vector b{};
    for (int i = 0; i < known; ++i) {
        b[i] = dot(changed_[i], rise);
        a[i][i] += kRidge * a[i][i] + 1e-30;
    }
    for (int i = 0; i < known; ++i) {
        for (int j = i + 1; j < known; ++j) {
            const double factor = a[j][i] / a[i][i];
            for (int k = i; k < known; ++k)
                a[j][k] -= factor * a[i][k];
            b[j] -= factor * b[i];
        }
    }
    for (int i = known - 1; i >= 0; --i) {
        for (int k = i + 1; k < known; ++k)
            b[i] -= a[i][k] * b[k];
        b[i] /= a[i][i];
    }
    return b;
}

void Anderson::step(std::vector<float>& x, const std::vector<float>& rise) {
    remember(x, rise);
    const Vector by = mix(rise);
    for (size_t i = 0; i < x.size(); ++i)
        x[i] += rise[i];
    for (int j = 0; j < std::min(taken_ - 1, kDepth); ++j) {
        const float factor = static_cast<float>(by[j]);
        for (size_t i = 0; i < x.size(); ++i)
            x[i] -= factor * (moved_[j][i] + changed_[j][i]);
    }
}

}  // namespace moetrain::planner
