// Numbers as expert_mlp stores them, what it multiplies, and the activations. Included once per instruction set, inside
// that set's target pragma and its own anonymous namespace: nothing here may be shared between files.
// No include here; see kernels.h.

struct Bf16 {
    uint16_t bits;
};
struct Fp16 {
    uint16_t bits;
};

template <bool kFirst, typename A, typename B>
struct If {
    using Type = A;
};
template <typename A, typename B>
struct If<false, A, B> {
    using Type = B;
};

template <typename To, typename From>
[[gnu::always_inline]] inline To bits_to(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    __builtin_memcpy(&to, &from, sizeof to);
    return to;
}

[[gnu::always_inline]] inline float load_number(Bf16 x) { return bits_to<float>(static_cast<uint32_t>(x.bits) << 16); }
[[gnu::always_inline]] inline float load_number(float x) { return x; }
[[gnu::always_inline]] inline double load_number(double x) { return x; }
// Scales by a power of two, which also brings subnormal halves to their place; Inf and NaN keep their exponent.
[[gnu::always_inline]] inline float load_number(Fp16 x) {
    const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffU) << 13;
    const float scaled = bits_to<float>(magnitude) * 0x1p112F;
    const uint32_t finite = bits_to<uint32_t>(scaled);
    const uint32_t bits = (x.bits & 0x7c00U) == 0x7c00U ? (magnitude | 0x7f800000U) : finite;
    return bits_to<float>(bits | (static_cast<uint32_t>(x.bits & 0x8000U) << 16));
}

[[gnu::always_inline]] inline void store_number(float x, float* to) { *to = x; }
[[gnu::always_inline]] inline void store_number(double x, double* to) { *to = x; }
[[gnu::always_inline]] inline void store_number(float x, Bf16* to) {
    const uint32_t bits = bits_to<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16;  // to nearest, ties to even
    to->bits = static_cast<uint16_t>(x != x ? 0x7fc0U : rounded);
}
[[gnu::always_inline]] inline void store_number(float x, Fp16* to) {
    const uint32_t bits = bits_to<uint32_t>(x);
    const uint32_t sign = (bits >> 16) & 0x8000U;
    const uint32_t magnitude = bits & 0x7fffffffU;
    // Normal halves: rebias and round the 13 bits that go. Subnormal ones: adding 0.5 lets the adder round them.
    const uint32_t normal = (magnitude - 0x38000000U + 0xfffU + ((magnitude >> 13) & 1U)) >> 13;
    const uint32_t small = bits_to<uint32_t>(bits_to<float>(magnitude) + 0.5F) - 0x3f000000U;
    uint32_t half = magnitude < 0x38800000U ? small : normal;
    half = magnitude >= 0x477ff000U ? 0x7c00U : half;
    half = magnitude > 0x7f800000U ? 0x7e00U : half;
    to->bits = static_cast<uint16_t>(half | sign);
}

// A policy names the stored number, the unit that a product reads (a pair of bf16, or one float) and the sum.
struct Bf16Pairs {
    using Store = Bf16;
    using Unit = uint32_t;
    using Acc = float;
    static constexpr int64_t kPack = 2;
    static constexpr bool kStoreIsUnit = true;
};
template <typename S>
struct Singles {
    using Store = S;
    using Unit = float;
    using Acc = float;
    static constexpr int64_t kPack = 1;
    static constexpr bool kStoreIsUnit = false;
};
template <>
struct Singles<float> {
    using Store = float;
    using Unit = float;
    using Acc = float;
    static constexpr int64_t kPack = 1;
    static constexpr bool kStoreIsUnit = true;
};
template <>
struct Singles<double> {
    using Store = double;
    using Unit = double;
    using Acc = double;
    static constexpr int64_t kPack = 1;
    static constexpr bool kStoreIsUnit = true;
};

// One unit of two (or one) stored numbers; what is missing is zero.
[[gnu::always_inline]] inline uint32_t make_unit(Bf16 low, Bf16 high, Bf16Pairs) {
    return static_cast<uint32_t>(low.bits) | (static_cast<uint32_t>(high.bits) << 16);
}

// Sixteen numbers at once, in whatever registers there are: reductions have the same order on every machine.
constexpr int64_t kLanes = 16;
template <typename Acc>
struct Lanes {
    typedef Acc Vector __attribute__((vector_size(kLanes * sizeof(Acc))));
    typedef If<sizeof(Acc) == 8, int64_t, int32_t>::Type Index;
    typedef Index Order __attribute__((vector_size(kLanes * sizeof(Acc))));
    Vector v;

    static Lanes load(const Acc* from) {
        Lanes lanes;
        __builtin_memcpy(&lanes.v, from, sizeof lanes.v);
        return lanes;
    }
    // Of numbers as they are stored.
    template <typename Store>
    [[gnu::always_inline]] static Lanes load_stored(const Store* from) {
        Acc numbers[kLanes];
        for (int64_t j = 0; j < kLanes; ++j)
            numbers[j] = load_number(from[j]);
        return load(numbers);
    }
    void store(Acc* to) const { __builtin_memcpy(to, &v, sizeof v); }
    void add(const Lanes& other) { v += other.v; }
    void keep_larger(const Lanes& other) { v = other.v > v ? other.v : v; }
    Lanes turned(Index by) const {
        Order order;
        for (Index i = 0; i < kLanes; ++i)
            order[i] = (i + by) % kLanes;
        return {__builtin_shuffle(v, order)};
    }
    Acc sum() const {
        Lanes all = *this;
        all.add(all.turned(8));
        all.add(all.turned(4));
        all.add(all.turned(2));
        all.add(all.turned(1));
        return all.v[0];
    }
    Acc largest() const {
        Lanes all = *this;
        all.keep_larger(all.turned(8));
        all.keep_larger(all.turned(4));
        all.keep_larger(all.turned(2));
        all.keep_larger(all.turned(1));
        return all.v[0];
    }
};

// Some Lanes that take every step side by side: alone, each would wait for the step before.
template <typename Acc, int kCount>
struct Abreast {
    Lanes<Acc> lanes[kCount];

    template <typename Step>
    [[gnu::always_inline]] static Abreast of(const Step& step) {
        Abreast all;
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i)
            all.lanes[i] = step(i);
        return all;
    }
    [[gnu::always_inline]] friend Abreast operator+(const Abreast& a, const Abreast& b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v + b.lanes[i].v}; });
    }
    [[gnu::always_inline]] friend Abreast operator-(const Abreast& a, const Abreast& b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v - b.lanes[i].v}; });
    }
    [[gnu::always_inline]] friend Abreast operator*(const Abreast& a, const Abreast& b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v * b.lanes[i].v}; });
    }
    [[gnu::always_inline]] friend Abreast operator+(const Abreast& a, Acc b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v + b}; });
    }
    [[gnu::always_inline]] friend Abreast operator-(const Abreast& a, Acc b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v - b}; });
    }
    [[gnu::always_inline]] friend Abreast operator*(const Abreast& a, Acc b) {
        return of([&](int i) { return Lanes<Acc>{a.lanes[i].v * b}; });
    }
    void store(Acc* to) const {
#pragma GCC unroll 8
        for (int i = 0; i < kCount; ++i)
            lanes[i].store(to + i * kLanes);
    }
    Acc sum() const {
        Lanes<Acc> all = lanes[0];
#pragma GCC unroll 8
        for (int i = 1; i < kCount; ++i)
            all.add(lanes[i]);
        return all.sum();
    }
};

// NaN goes through all of these.
[[gnu::always_inline]] inline float at_least(float x, float lowest) { return x < lowest ? lowest : x; }
[[gnu::always_inline]] inline float at_most(float x, float highest) { return x > highest ? highest : x; }
template <int kCount>
[[gnu::always_inline]] inline auto at_least(const Abreast<float, kCount>& x, float lowest) {
    const Lanes<float>::Vector limit = Lanes<float>::Vector{} + lowest;
    return Abreast<float, kCount>::of([&](int i) {
        const auto v = x.lanes[i].v;
        return Lanes<float>{v < limit ? limit : v};
    });
}
template <int kCount>
[[gnu::always_inline]] inline auto at_most(const Abreast<float, kCount>& x, float highest) {
    const Lanes<float>::Vector limit = Lanes<float>::Vector{} + highest;
    return Abreast<float, kCount>::of([&](int i) {
        const auto v = x.lanes[i].v;
        return Lanes<float>{v > limit ? limit : v};
    });
}

// 2^n of n + 1.5 * 2^23, which has the whole number n in its last bits.
constexpr float kRoundToWhole = 12582912.F;
[[gnu::always_inline]] inline float power_of_two(float shifted) {
    return bits_to<float>((bits_to<uint32_t>(shifted) << 23) + (127U << 23));
}
template <int kCount>
[[gnu::always_inline]] inline auto power_of_two(const Abreast<float, kCount>& shifted) {
    using Floats = Lanes<float>::Vector;
    typedef uint32_t Words __attribute__((vector_size(sizeof(Floats))));
    return Abreast<float, kCount>::of([&](int i) {
        const auto words = (reinterpret_cast<Words>(shifted.lanes[i].v) << 23) + (127U << 23);
        return Lanes<float>{reinterpret_cast<Floats>(words)};
    });
}

// exp(x), 0 below -87.3 and exp(88) above 88: Cephes' polynomial, below 2 ulp. Written so that compilers vectorise it.
template <typename Value>
[[gnu::always_inline]] inline Value exp_of(const Value& x) {
    const Value clamped = at_most(at_least(x, -87.3F), 88.F);
    const Value shifted = clamped * 1.44269504F + kRoundToWhole;
    const Value whole = shifted - kRoundToWhole;
    const Value r = (clamped - whole * 0.693359375F) + whole * 2.12194440e-4F;
    Value p = r * 1.9875691500e-4F + 1.3981999507e-3F;
    p = p * r + 8.3334519073e-3F;
    p = p * r + 4.1665795894e-2F;
    p = p * r + 1.6666665459e-1F;
    p = p * r + 5.0000001201e-1F;
    const Value mantissa = p * r * r + r + 1.F;
    return mantissa * power_of_two(shifted);
}
[[gnu::always_inline]] inline float exp_clamped(float x) { return exp_of(x); }
[[gnu::always_inline]] inline double exp_clamped(double x) { return __builtin_exp(x); }
template <int kCount>
[[gnu::always_inline]] inline auto exp_clamped(const Abreast<float, kCount>& x) {
    return exp_of(x);
}
template <int kCount>
inline auto exp_clamped(const Abreast<double, kCount>& x) {
    auto y = x;
    for (auto& lanes : y.lanes) {
        for (int64_t j = 0; j < kLanes; ++j)
            lanes.v[j] = __builtin_exp(lanes.v[j]);
    }
    return y;
}

template <typename Acc>
[[gnu::always_inline]] inline Acc sigmoid(Acc x) {
    return Acc(1) / (Acc(1) + exp_clamped(-x));
}
template <typename Acc, int kCount>
[[gnu::always_inline]] inline auto sigmoid(const Abreast<Acc, kCount>& x) {
    const auto below = exp_clamped(x * Acc(-1)) + Acc(1);
    return Abreast<Acc, kCount>::of([&](int i) { return Lanes<Acc>{Acc(1) / below.lanes[i].v}; });
}

// The normal distribution's cumulative function, without its far tail's relative accuracy: Abramowitz and Stegun
// 7.1.26, absolute error 1.5e-7, half of it here. `density` becomes exp(-x^2 / 2) / sqrt(2 pi).
[[gnu::always_inline]] inline float normal_cdf(float x, float* density) {
    const float z = (x < 0 ? -x : x) * 0.70710678F;
    const float t = 1.F / (1.F + 0.3275911F * z);
    const float decay = exp_clamped(-z * z);
    float p = 1.061405429F;
    p = p * t - 1.453152027F;
    p = p * t + 1.421413741F;
    p = p * t - 0.284496736F;
    p = p * t + 0.254829592F;
    const float upper_tail = 0.5F * p * t * decay;
    *density = decay * 0.39894228F;
    return x < 0 ? upper_tail : 1.F - upper_tail;
}
[[gnu::always_inline]] inline double normal_cdf(double x, double* density) {
    *density = __builtin_exp(-0.5 * x * x) * 0.39894228040143267794;
    return 0.5 * __builtin_erfc(-x * 0.70710678118654752440);
}

// value and slope of an ungated activation
template <typename Acc>
[[gnu::always_inline]] inline Acc activate(Activation activation, Acc h, Acc* slope) {
    if (activation == Activation::kRelu2) {
        const Acc positive = h > 0 || h != h ? h : Acc(0);
        *slope = 2 * positive;
        return positive * positive;
    }
    Acc density;
    const Acc cdf = normal_cdf(h, &density);
    *slope = cdf + h * density;
    return h * cdf;
}

// kCount sums, rounded and stored; by the instruction set's own conversion where it has one.
template <int64_t kCount, typename Tile, typename Acc, typename Store>
[[gnu::always_inline]] inline void store_numbers(const Acc* from, Store* to) {
    if constexpr (requires { Tile::template round<kCount>(from, to); }) {
        Tile::template round<kCount>(from, to);
    } else {
        for (int64_t j = 0; j < kCount; ++j)
            store_number(from[j], to + j);
    }
}
