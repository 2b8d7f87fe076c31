// The words that training loops are written in beside those of simd.hpp: vectors of either real type, of which the last
// of a row may be short, who works on what, and a matrix turned over.
#pragma once
#include "sequences.hpp"
#include "simd.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

/// Sixteen doubles: the same words as F16, in loops that the compiler turns into what the instruction set has.
struct D16 {
    double v[kLanes];
};
#define SF_LANES(expression)                                       \
    D16 out;                                                       \
    for (uint32_t i = 0; i < kLanes; ++i) out.v[i] = (expression); \
    return out
SF_INLINE D16 set1(double a) { SF_LANES(a); }
SF_INLINE D16 load(const double* p) { SF_LANES(p[i]); }
SF_INLINE void store(double* p, const D16& a) {
    for (uint32_t i = 0; i < kLanes; ++i) p[i] = a.v[i];
}
SF_INLINE D16 load_first(const double* p, uint32_t n) { SF_LANES(i < n ? p[i] : 0.0); }
SF_INLINE void store_first(double* p, uint32_t n, const D16& a) {
    for (uint32_t i = 0; i < n; ++i) p[i] = a.v[i];
}
SF_INLINE D16 add(const D16& a, const D16& b) { SF_LANES(a.v[i] + b.v[i]); }
SF_INLINE D16 sub(const D16& a, const D16& b) { SF_LANES(a.v[i] - b.v[i]); }
SF_INLINE D16 mul(const D16& a, const D16& b) { SF_LANES(a.v[i] * b.v[i]); }
SF_INLINE D16 div(const D16& a, const D16& b) { SF_LANES(a.v[i] / b.v[i]); }
SF_INLINE D16 fma(const D16& a, const D16& b, const D16& c) { SF_LANES(a.v[i] * b.v[i] + c.v[i]); }
SF_INLINE D16 min(const D16& a, const D16& b) { SF_LANES(a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
SF_INLINE D16 max(const D16& a, const D16& b) { SF_LANES(a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
SF_INLINE D16 keep(uint32_t bits, const D16& a) { SF_LANES((bits >> i & 1) ? a.v[i] : 0.0); }
SF_INLINE D16 sigmoid(const D16& a) { SF_LANES(1.0 / (1.0 + __builtin_exp(-a.v[i]))); }
SF_INLINE D16 tanh(const D16& a) { SF_LANES(__builtin_tanh(a.v[i])); }
#undef SF_LANES
SF_INLINE uint32_t not_le(const D16& a, const D16& b) {
    uint32_t bits = 0;
    for (uint32_t i = 0; i < kLanes; ++i) bits |= static_cast<uint32_t>(!(a.v[i] <= b.v[i])) << i;
    return bits;
}
SF_INLINE double sum(const D16& a) {
    double lanes[kLanes];
    store(lanes, a);
    for (uint32_t half = kLanes / 2; half; half /= 2)
        for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    return lanes[0];
}
SF_INLINE uint32_t compress(uint32_t bits, uint32_t first, const D16& a, uint32_t* index, double* value) {
    uint32_t n = 0;
    for (; bits; bits &= bits - 1, ++n) {
        const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(bits));
        index[n] = first + lane;
        value[n] = a.v[lane];
    }
    return n;
}
SF_INLINE void add_sums(double* out, const D16& a, const D16& b, const D16& c, const D16& d) {
    out[0] += sum(a), out[1] += sum(b), out[2] += sum(c), out[3] += sum(d);
}

template <class Real>
struct VectorOf;
template <>
struct VectorOf<float> {
    using type = F16;
};
template <>
struct VectorOf<double> {
    using type = D16;
};
template <class Real>
using Vec = typename VectorOf<Real>::type;

constexpr uint32_t kSums = kHiding * 3 / 2;  // of a tile's row that stay in registers

template <class Real>
SF_INLINE Vec<Real> load_some(const Real* p, uint32_t n) {  // the first n of sixteen, zeros behind
    return n < kLanes ? load_first(p, n) : load(p);
}
template <class Real>
SF_INLINE void store_some(Real* p, uint32_t n, const Vec<Real>& a) {
    if (n < kLanes)
        store_first(p, n, a);
    else
        store(p, a);
}
template <class V>
SF_INLINE uint32_t is_nan(const V& a) {
    return not_le(a, a);
}
template <class Real>
SF_INLINE uint32_t not_zero(const Vec<Real>& x) {
    const Vec<Real> zero = set1(Real(0));
    return not_le(x, zero) | not_le(zero, x);
}
SF_INLINE uint32_t first_lanes(uint32_t left) { return left < kLanes ? (1u << left) - 1 : 0xffff; }

/// Calls f with the number of vectors in a tile's row as a constant.
template <uint32_t N>
struct Width {
    static constexpr uint32_t value = N;
};
template <class F>
SF_INLINE void with_width(uint32_t n, const F& f) {
    switch (n) {
        case 1:
            return f(Width<1>{});
        case 2:
            return f(Width<2>{});
        case 3:
            return f(Width<3>{});
        case 4:
            return f(Width<4>{});
        case 6:
            return f(Width<6>{});
        case 8:
            return f(Width<8>{});
        case 9:
            return f(Width<9>{});
        default:
            return f(Width<12>{});
    }
}

// Sums in registers, and how many of a panel's vectors are multiplied at a time: where registers are few, one, and
// more samples.
template <class Real>
struct BlockOf {
    static constexpr uint32_t sums = kSums, vectors = 1;
};
#if defined(__AVX512F__)
template <>
struct BlockOf<float> {
    static constexpr uint32_t sums = 24, vectors = kPanelVectors;
};
#endif
template <>
struct BlockOf<double> {
    static constexpr uint32_t sums = 2, vectors = 1;
};

/// Calls f with n, at most Most, as a constant.
template <uint32_t Most, class F>
SF_INLINE void with_number(uint32_t n, const F& f) {
    if constexpr (Most > 1)
        if (n < Most) return with_number<Most - 1>(n, f);
    f(Width<Most>{});
}

/// The same pointer: compilers otherwise keep one register for each vector of a row, and lack them.
template <class Real>
SF_INLINE const Real* one_base(const Real* p) {
    asm("" : "+r"(p));
    return p;
}

SF_INLINE uint32_t share(uint32_t n, uint32_t number, uint32_t members) {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * number / members);
}
/// The part of n tiles (or rows, ...) that a member works on.
struct Part {
    uint32_t first, last;
    Part(uint32_t n, const Member& m) : first(share(n, m.number, m.members)), last(share(n, m.number + 1, m.members)) {}
};

/// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, zeros up to kLanes; says whether any is not finite.
template <class Real>
static __attribute__((noinline)) uint32_t turn(const Real* from, size_t from_stride, uint32_t rows, uint32_t cols,
                                               Real* to, size_t to_stride) {
    alignas(64) Real room[kLanes * kLanes];
    Vec<Real> zeros = set1(Real(0));
    for (uint32_t r = 0; r < rows; ++r) {
        const Vec<Real> x = load_some(from + r * from_stride, cols);
        zeros = fma(x, set1(Real(0)), zeros);
        store(room + r * kLanes, x);
    }
    for (uint32_t r = rows; r < kLanes; ++r) store(room + r * kLanes, set1(Real(0)));
    for (uint32_t c = 0; c < cols; ++c) {
        Real* line = to + c * to_stride;
        for (uint32_t r = 0; r < kLanes; ++r) line[r] = room[r * kLanes + c];
    }
    return is_nan(zeros) != 0;
}

/// Of the tiles, those of the strips that a member works on; where nothing is packed in strips every tile is one.
struct Strips : Part {
    uint32_t first_tile, last_tile;
    Strips(uint32_t units, uint32_t strips, const Member& m) : Part(strips ? strips : count_of_tiles(units), m) {
        const uint32_t tiles = count_of_tiles(units), of = strips ? strips : tiles;
        first_tile = of ? share(tiles, first, of) : 0;
        last_tile = of ? share(tiles, last, of) : 0;
    }
};

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
