// Training: one layer over a whole sequence, forward with a tape and backward, reading only what events make necessary
// (docs/equations.md, "Sparse back-propagation through time").
//
// A weight is transposed once for a sequence (`Transposed`). A tile of it, kTile units of every gate against one input,
// is one contiguous row of at most twelve vectors: the forward adds rows of the units that spoke to sums in registers,
// the backward multiplies the same rows with the tile's gradients, for the units that need theirs. Work is shared by
// tiles; a sum has one order, whoever makes it.
#pragma once
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

constexpr uint32_t kSums = kAccumulators * 3 / 2;  // of a tile's row that stay in registers

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

/// The same pointer: compilers otherwise keep one register for each vector of a row, and lack them.
template <class Real>
SF_INLINE const Real* one_base(const Real* p) {
    asm("" : "+r"(p));
    return p;
}

/// acc[0 .. N) += sum over the list of value * the row of that index; rows lie `stride` vectors apart.
template <uint32_t N, class Real>
SF_INLINE void add_rows(Real* acc, const Real* rows, uint32_t stride, const uint32_t* index, const Real* value,
                        uint32_t n) {
    constexpr uint32_t kNow = N < kSums ? N : kSums;
    Vec<Real> total[kNow];
    for (uint32_t i = 0; i < kNow; ++i) total[i] = load(acc + i * kLanes);
    for (uint32_t k = 0; k < n; ++k) {
        const Real* row = one_base(rows + static_cast<size_t>(index[k]) * stride * kLanes);
        const Vec<Real> x = set1(value[k]);
        for (uint32_t i = 0; i < kNow; ++i) total[i] = fma(load(row + i * kLanes), x, total[i]);
    }
    for (uint32_t i = 0; i < kNow; ++i) store(acc + i * kLanes, total[i]);
    if constexpr (N > kNow) add_rows<N - kNow>(acc + kNow * kLanes, rows + kNow * kLanes, stride, index, value, n);
}

/// out[k] += row index[k] * q, over N vectors, for k < n, a multiple of four.
template <uint32_t N, class Real>
SF_INLINE void add_dots(Real* out, const Real* rows, const Real* q, const uint32_t* index, uint32_t n) {
    Vec<Real> x[N];
    for (uint32_t i = 0; i < N; ++i) x[i] = load(q + i * kLanes);
    const auto row = [&](uint32_t k) { return one_base(rows + static_cast<size_t>(index[k]) * N * kLanes); };
    for (uint32_t k = 0; k < n; k += 4) {
        const Real *r0 = row(k), *r1 = row(k + 1), *r2 = row(k + 2), *r3 = row(k + 3);
        Vec<Real> a = mul(load(r0), x[0]), b = mul(load(r1), x[0]), c = mul(load(r2), x[0]), d = mul(load(r3), x[0]);
        for (uint32_t i = 1; i < N; ++i) {
            a = fma(load(r0 + i * kLanes), x[i], a);
            b = fma(load(r1 + i * kLanes), x[i], b);
            c = fma(load(r2 + i * kLanes), x[i], c);
            d = fma(load(r3 + i * kLanes), x[i], d);
        }
        add_sums(out + k, a, b, c, d);
    }
}

/// Brings the k-th row of those of `bits` on its way, and the next ones up to `n`; returns the bits that are left.
/// Weights pass through the second level of cache once a step: what is asked for in order arrives as fast as it can.
template <uint32_t N, class Real>
SF_INLINE uint64_t fetch(const Real* rows, uint64_t bits, uint32_t n) {
    constexpr uint32_t kLine = 64 / sizeof(Real);
    for (; bits && n; bits &= bits - 1, --n) {
        const Real* row = rows + static_cast<size_t>(__builtin_ctzll(bits)) * N * kLanes;
        for (uint32_t i = 0; i < N * kLanes; i += kLine) __builtin_prefetch(row + i, 0, 2);
    }
    return bits;
}

SF_INLINE uint32_t share(uint32_t n, uint32_t number, uint32_t members) {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * number / members);
}
/// The part of n tiles (or rows, ...) that a member works on.
struct Part {
    uint32_t first, last;
    Part(uint32_t n, const Member& m) : first(share(n, m.number, m.members)), last(share(n, m.number + 1, m.members)) {}
};

template <class Real>
SF_INLINE const Real* tile_of(const Transposed<Real>& w, uint32_t tile) {
    return w.values + static_cast<size_t>(tile) * kTile * w.gates * w.cols;
}

/// to[c * to_stride + r] = from[r * from_stride + c] for r < rows, zeros up to kLanes; says whether any is not finite.
template <class Real>
SF_INLINE uint32_t turn(const Real* from, size_t from_stride, uint32_t rows, uint32_t cols, Real* to,
                        size_t to_stride) {
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

template <class Real>
static void transpose(const TransposeArgs<Real>& a, const Member& m) {
    const Part part(count_of_tiles(a.units), m);
    uint32_t wild = 0;
    for (uint32_t tile = part.first; tile < part.last; ++tile) {
        const uint32_t vectors = tile_vectors(a.units, tile), width = a.gates * vectors * kLanes;
        Real* out = a.values + static_cast<size_t>(tile) * kTile * a.gates * a.cols;
        for (uint32_t col = 0; col < a.cols; col += kLanes) {
            const uint32_t cols = a.cols - col < kLanes ? a.cols - col : kLanes;
            for (uint32_t gate = 0; gate < a.gates; ++gate)
                for (uint32_t v = 0; v < vectors; ++v) {
                    const uint32_t unit = tile * kTile + v * kLanes;
                    const uint32_t rows = a.units - unit < kLanes ? a.units - unit : kLanes;
                    const Real* from = a.weight + (static_cast<size_t>(gate) * a.units + unit) * a.cols + col;
                    Real* to = out + static_cast<size_t>(col) * width + (gate * vectors + v) * kLanes;
                    wild |= turn(from, a.cols, rows, cols, to, width);
                }
        }
    }
    a.wild[m.number] = wild;
}

/// Appends to the list of row `row` the lanes of `bits` of `x`, the values of units from `unit` on. Rows come in order,
/// and a row's units too.
template <class Real>
SF_INLINE void append(const Spoken<Real>& s, uint32_t row, uint32_t unit, uint32_t bits, const Vec<Real>& x) {
    const uint32_t segment = unit / kSegment, lane = unit % kSegment;
    uint32_t& count = s.count[static_cast<size_t>(segment) * s.rows + row];
    if (lane == 0) count = 0;
    if (lane == 0 && row == 0) s.any[segment] = 0;
    s.any[segment] |= static_cast<uint64_t>(bits) << lane;
    const size_t at = row * s.stride + static_cast<size_t>(segment) * kSegment + count;
    count += compress(bits, lane, x, s.index + at, s.value + at);
}

template <class Real>
SF_INLINE uint32_t not_zero(const Vec<Real>& x) {
    const Vec<Real> zero = set1(Real(0));
    return not_le(x, zero) | not_le(zero, x);
}

/// acc (rows, N vectors) += W x of one tile.
template <uint32_t N, class Real>
SF_INLINE void add_products(Real* acc, const Real* tile, uint32_t cols, const Spoken<Real>& x, const Real* value) {
    const uint32_t segments = count_of_segments(cols), ahead = (kSegment + x.rows - 1) / x.rows;
    for (uint32_t s = 0; s < segments; ++s) {
        const Real* w = tile + static_cast<size_t>(s) * kSegment * N * kLanes;
        const uint32_t* counts = x.count + static_cast<size_t>(s) * x.rows;
        uint64_t coming = s + 1 < segments ? x.any[s + 1] : 0;
        for (uint32_t r = 0; r < x.rows; ++r) {
            coming = fetch<N>(w + kSegment * N * kLanes, coming, ahead);
            if (!counts[r]) continue;
            const size_t at = r * x.stride + static_cast<size_t>(s) * kSegment;
            add_rows<N>(acc + static_cast<size_t>(r) * N * kLanes, w, N, x.index + at, value + at, counts[r]);
        }
    }
}

template <class Real>
static void input_product(const InputProductArgs<Real>& a, const Member& m) {
    const Transposed<Real>& w = a.weight;
    const Part part(count_of_tiles(w.units), m);
    alignas(64) Real acc[3 * kTile];
    for (uint32_t tile = part.first; tile < part.last; ++tile) {
        const uint32_t vectors = tile_vectors(w.units, tile), n = w.gates * vectors;
        with_width(n, [&](auto width) {
            for (uint32_t r = 0; r < a.rows; ++r) {
                const auto each = [&](auto f) {
                    for (uint32_t i = 0; i < n; ++i) {
                        const uint32_t unit = tile * kTile + i % vectors * kLanes;
                        f(acc + i * kLanes, i / vectors * w.units + unit, w.units - unit);
                    }
                };
                each([&](Real* to, uint32_t at, uint32_t left) { store(to, load_some(a.bias + at, left)); });
                const uint32_t first = a.start[r];
                add_rows<decltype(width)::value>(acc, tile_of(w, tile), n, a.index + first, a.value + first,
                                                 a.start[r + 1] - first);
                each([&](Real* from, uint32_t at, uint32_t left) {
                    store_some(a.out + r * a.stride + at, left, load(from));
                });
            }
        });
    }
}

/// The surrogate's argument, its value, and everything else about an event that both directions ask for.
template <class Real>
SF_INLINE Vec<Real> surrogate(const EgruArgs<Real>& a, const Vec<Real>& v) {
    const Vec<Real> zero = set1(Real(0)), size = max(v, sub(zero, v));
    return mul(set1(a.height), max(zero, sub(set1(Real(1)), div(size, set1(a.half_width)))));
}

template <class Real>
SF_INLINE Vec<Real> event(const EgruArgs<Real>& a, const Vec<Real>& v) {
    const Vec<Real> zero = set1(Real(0)), one = set1(Real(1));
    if (a.event == Event::always) return one;
    if (a.event == Event::threshold) return keep(not_le(v, zero) & ~is_nan(v), one);
    const Vec<Real> w = set1(a.half_width), c = max(sub(zero, w), min(w, v)), size = max(c, sub(zero, c));
    // height (c + w / 2 - c |c| / (2 w))
    const Vec<Real> bend = mul(mul(c, size), set1(Real(0.5) / a.half_width));
    return mul(set1(a.height), sub(fma(w, set1(Real(0.5)), c), bend));
}

/// (1 - w) a + w b as torch.lerp takes it, infinities included: from whichever end is nearer.
template <class Real>
SF_INLINE Vec<Real> lerp(const Vec<Real>& a, const Vec<Real>& b, const Vec<Real>& w) {
    const Vec<Real> way = sub(b, a), zero = set1(Real(0));
    const uint32_t near_a = not_le(set1(Real(0.5)), w);  // w < 0.5, or NaN, which either way brings
    const Vec<Real> from_b = fma(sub(zero, way), sub(set1(Real(1)), w), b);
    return add(keep(near_a, fma(way, w, a)), keep(~near_a & 0xffff, from_b));
}

/// The state that the next step reads.
template <class Real>
SF_INLINE Vec<Real> carried(const EgruArgs<Real>& a, const Vec<Real>& u, const Vec<Real>& o, const Vec<Real>& theta) {
    return a.reset == Reset::threshold ? fma(sub(set1(Real(0)), o), theta, u) : u;
}

template <class Real>
static void egru_forward(const EgruForwardArgs<Real>& a, const Member& m) {
    const uint32_t H = a.units, B = a.batch;
    const Part part(count_of_tiles(H), m);
    Real* acc = a.room + static_cast<size_t>(m.number) * B * 3 * kTile;
    const Vec<Real> zero = set1(Real(0));
    const auto units = [&](uint32_t tile, auto f) {  // vector by vector of the tile, sample by sample
        const uint32_t vectors = tile_vectors(H, tile);
        for (uint32_t b = 0; b < B; ++b)
            for (uint32_t v = 0; v < vectors; ++v) {
                const uint32_t j = tile * kTile + v * kLanes;
                f(b, v, vectors, j, H - j);
            }
    };
    const auto says = [&](const Spoken<Real>& list, uint32_t b, uint32_t j, uint32_t left, const Vec<Real>& y) {
        append(list, b, j, (a.every ? 0xffffu : not_zero<Real>(y)) & first_lanes(left), y);
    };
    const auto product = [&](const Transposed<Real>& w, uint32_t tile, const Spoken<Real>& x, const Real* value) {
        with_width(w.gates * tile_vectors(H, tile),
                   [&](auto width) { add_products<decltype(width)::value>(acc, tile_of(w, tile), H, x, value); });
    };
    for (uint32_t tile = part.first; tile < part.last; ++tile)
        units(tile, [&](uint32_t b, uint32_t, uint32_t, uint32_t j, uint32_t left) {
            const size_t at = static_cast<size_t>(b) * H + j;
            says(a.spoken[0], b, j, left, load_some(a.y0 + at, left));
            store_some(a.h + at, left, load_some(a.h0 + at, left));
        });
    m.wait(m.team);
    for (uint32_t t = 0; t < a.steps; ++t) {
        const Spoken<Real>&said = a.spoken[t % 2], &next = a.spoken[(t + 1) % 2];
        const Real* y_old = t ? a.y + static_cast<size_t>(t - 1) * B * H : a.y0;
        const auto tape = [&](uint32_t b, uint32_t gate, uint32_t j) {
            return a.tape + (static_cast<size_t>(t) * B + b) * 4 * H + gate * H + j;
        };
        if (!a.reset_after) {  // r of every unit that spoke, before n can be known
            for (uint32_t tile = part.first; tile < part.last; ++tile) {
                for (size_t i = 0; i < static_cast<size_t>(B) * 2 * kTile; i += kLanes) store(acc + i, zero);
                product(a.hidden, tile, said, said.value);
                units(tile, [&](uint32_t b, uint32_t v, uint32_t vectors, uint32_t j, uint32_t left) {
                    const Real* sums = acc + (static_cast<size_t>(b) * 2 * vectors + v) * kLanes;
                    for (uint32_t gate = 0; gate < 2; ++gate) {
                        Real* at = tape(b, gate, j);
                        store_some(at, left, sigmoid(add(load_some(at, left), load(sums + gate * vectors * kLanes))));
                    }
                });
                for (uint32_t b = 0; b < B; ++b) {
                    const size_t at = b * said.stride + static_cast<size_t>(tile) * kSegment;
                    const Real* r = tape(b, 0, tile * kSegment);
                    for (uint32_t k = 0; k < said.count[static_cast<size_t>(tile) * B + b]; ++k)
                        a.scaled[at + k] = r[said.index[at + k]] * said.value[at + k];
                }
            }
            m.wait(m.team);
        }
        for (uint32_t tile = part.first; tile < part.last; ++tile) {
            const uint32_t gates = a.reset_after ? 3 : 1, vectors = tile_vectors(H, tile);
            for (uint32_t b = 0; b < B; ++b)
                for (uint32_t i = 0; i < gates * vectors; ++i) {
                    const uint32_t j = tile * kTile + i % vectors * kLanes;
                    const bool biased = a.bias_n && i >= 2 * vectors;
                    store(acc + (static_cast<size_t>(b) * gates * vectors + i) * kLanes,
                          biased ? load_some(a.bias_n + j, H - j) : zero);
                }
            if (a.reset_after)
                product(a.hidden, tile, said, said.value);
            else
                product(a.hidden_n, tile, said, a.scaled);
            units(tile, [&](uint32_t b, uint32_t v, uint32_t, uint32_t j, uint32_t left) {
                const Real* sums = acc + (static_cast<size_t>(b) * gates * vectors + v) * kLanes;
                Real *at_r = tape(b, 0, j), *at_z = tape(b, 1, j), *at_n = tape(b, 2, j), *at_k = tape(b, 3, j);
                Vec<Real> z = load_some(at_z, left), n = load_some(at_n, left);
                if (a.reset_after) {
                    const Vec<Real> r = sigmoid(add(load_some(at_r, left), load(sums)));
                    const Vec<Real> k = load(sums + 2 * vectors * kLanes);
                    z = sigmoid(add(z, load(sums + vectors * kLanes)));
                    n = tanh(fma(r, k, n));
                    store_some(at_r, left, r);
                    store_some(at_z, left, z);
                    store_some(at_k, left, k);
                } else {
                    n = tanh(add(n, load(sums)));
                }
                store_some(at_n, left, n);
                const size_t at = static_cast<size_t>(b) * H + j, now = static_cast<size_t>(t) * B * H + at;
                const Vec<Real> h = load_some(a.h + at, left), theta = load_some(a.theta + j, left);
                Vec<Real> u = lerp<Real>(n, h, z);
                if (a.reset == Reset::output) u = sub(u, load_some(y_old + at, left));
                if (a.mask)
                    u = lerp<Real>(h, u, load_some(a.mask + now, left));
                else if (a.keep != 0)
                    u = lerp<Real>(u, h, set1(a.keep));
                const Vec<Real> o = event(a, sub(u, theta));
                const Vec<Real> y = fma(o, u, zero);  // + 0: a silent unit says +0.0 where u is negative
                store_some(a.u + now, left, u);
                store_some(a.o + now, left, o);
                store_some(a.y + now, left, y);
                store_some(a.h + at, left, carried(a, u, o, theta));
                says(next, b, j, left, y);
            });
        }
        m.wait(m.team);
    }
}

template <class Real>
static void egru_backward(const EgruBackwardArgs<Real>& a, const Member& m) {
    const uint32_t H = a.units, B = a.batch, tiles = count_of_tiles(H);
    const Part part(tiles, m);
    const Vec<Real> zero = set1(Real(0)), one = set1(Real(1));
    const size_t step = static_cast<size_t>(B) * H;
    const bool thresholds = a.reset == Reset::threshold, zoned = a.mask || a.keep != 0;
    const uint32_t gates = a.reset_after ? 3 : 2;
    const auto some = [&](const Real* p, size_t at, uint32_t left) { return p ? load_some(p + at, left) : zero; };
    const auto add_to = [&](Real* p, uint32_t left, const Vec<Real>& x) {
        store_some(p, left, add(load_some(p, left), x));
    };
    const auto own = [&](auto f) {  // every vector of units of this member, sample by sample within a tile
        for (uint32_t tile = part.first; tile < part.last; ++tile) {
            const uint32_t vectors = tile_vectors(H, tile);
            for (uint32_t b = 0; b < B; ++b)
                for (uint32_t v = 0; v < vectors; ++v) {
                    const uint32_t j = tile * kTile + v * kLanes;
                    f(tile, vectors, b, v, j, H - j);
                }
        }
    };
    const uint32_t parts = count_of_near(H), first_part = part.first * (kTile / kNear);
    const uint32_t end = part.last * (kTile / kNear), last_part = end < parts ? end : parts;
    const uint32_t ahead = (kNear + B - 1) / B;
    /// out[b, j] += row j of W * sent of sample b, where needed.
    const auto dots = [&](const Transposed<Real>& w, const Real* sent, Real* out, bool upwards) {
        const auto lists = [&](auto f) {
            for (uint32_t s = first_part; s < last_part; ++s)
                for (uint32_t b = 0; b < B; ++b)
                    f(s, b, a.need.count[static_cast<size_t>(s) * B + b],
                      b * a.need.stride + static_cast<size_t>(s) * kNear);
        };
        lists([&](uint32_t, uint32_t, uint32_t count, size_t at) {
            for (uint32_t k = 0; k < count; k += 4)
                for (uint32_t i = 0; i < 4; ++i) a.need.value[at + k + i] = 0;
        });
        for (uint32_t turn = 0; turn < tiles; ++turn) {
            const uint32_t tile = upwards ? turn : tiles - 1 - turn;  // what was read last is still in the cache
            with_width(w.gates * tile_vectors(H, tile), [&](auto width) {
                constexpr uint32_t N = decltype(width)::value;
                const Real* q = sent + static_cast<size_t>(tile) * kTile * w.gates * B;
                for (uint32_t s = first_part; s < last_part; ++s) {
                    const Real* rows = tile_of(w, tile) + static_cast<size_t>(s) * kNear * N * kLanes;
                    uint64_t coming = s + 1 < last_part ? a.need.any[s + 1] : 0;
                    for (uint32_t b = 0; b < B; ++b) {
                        coming = fetch<N>(rows + kNear * N * kLanes, coming, ahead);
                        const uint32_t count = a.need.count[static_cast<size_t>(s) * B + b];
                        if (!count) continue;
                        const size_t at = b * a.need.stride + static_cast<size_t>(s) * kNear;
                        add_dots<N>(a.need.value + at, rows, q + static_cast<size_t>(b) * N * kLanes, a.need.index + at,
                                    (count + 3) / 4 * 4);
                    }
                }
            });
        }
        lists([&](uint32_t s, uint32_t b, uint32_t count, size_t at) {
            Real* to = out + static_cast<size_t>(b) * H + s * kNear;
            for (uint32_t k = 0; k < count; ++k) to[a.need.index[at + k]] += a.need.value[at + k];
        });
    };
    own([&](uint32_t, uint32_t, uint32_t b, uint32_t, uint32_t j, uint32_t left) {
        const size_t at = static_cast<size_t>(b) * H + j;
        store_some(a.dy + at, left, some(a.grad_y_n, at, left));
        store_some(a.dh + at, left, some(a.grad_h_n, at, left));
        if (b) return;
        store_some(a.dtheta + j, left, zero);
        for (uint32_t gate = 0; gate < 4; ++gate) store_some(a.dbias + gate * H + j, left, zero);
    });
    for (uint32_t t = a.steps; t-- > 0;) {
        const Real* u_old = t ? a.u + (t - 1) * step : nullptr;
        const Real* o_old = t ? a.o + (t - 1) * step : nullptr;
        const Real* y_old = t ? a.y + (t - 1) * step : a.y0;
        const size_t row = static_cast<size_t>(t) * B;
        own([&](uint32_t tile, uint32_t vectors, uint32_t b, uint32_t v, uint32_t j, uint32_t left) {
            const size_t at = static_cast<size_t>(b) * H + j, now = t * step + at;
            const Real* tape = a.tape + (row + b) * 4 * H + j;
            const Vec<Real> r = load_some(tape, left), z = load_some(tape + H, left), n = load_some(tape + 2 * H, left);
            const Vec<Real> u = load_some(a.u + now, left), o = load_some(a.o + now, left);
            const Vec<Real> theta = load_some(a.theta + j, left), dh = load_some(a.dh + at, left);
            const Vec<Real> dy = add(some(a.grad_y, now, left), load_some(a.dy + at, left));
            Vec<Real> dv = zero;
            if (a.event != Event::always) {
                dv = fma(u, dy, some(a.grad_o, now, left));
                if (thresholds) dv = sub(dv, mul(theta, dh));
                dv = mul(surrogate(a, sub(u, theta)), dv);
            }
            add_to(a.dtheta + j, left, sub(zero, thresholds ? fma(o, dh, dv) : dv));
            Vec<Real> du = add(add(fma(o, dy, dv), dh), some(a.grad_u, now, left)), kept = zero;
            if (zoned) {
                const Vec<Real> fresh = a.mask ? load_some(a.mask + now, left) : set1(Real(1) - a.keep);
                kept = mul(sub(one, fresh), du);
                du = mul(fresh, du);
            }
            const Vec<Real> h = u_old ? carried(a, load_some(u_old + at, left), load_some(o_old + at, left), theta)
                                      : load_some(a.h0 + at, left);
            const Vec<Real> dz = mul(mul(sub(h, n), du), mul(z, sub(one, z)));
            const Vec<Real> dn = mul(mul(sub(one, z), du), fma(sub(zero, n), n, one));
            store_some(a.dh + at, left, fma(z, du, kept));
            store_some(a.dy + at, left, a.reset == Reset::output ? sub(zero, du) : zero);
            Real* out = a.gates + (row + b) * 4 * H + j;
            store_some(out + H, left, dz);
            store_some(out + 2 * H, left, dn);
            add_to(a.dbias + H + j, left, dz);
            add_to(a.dbias + 2 * H + j, left, dn);
            Real* sent = a.sent[t % 2] + static_cast<size_t>(tile) * kTile * gates * B +
                         (static_cast<size_t>(b) * gates * vectors + v) * kLanes;
            store(sent + vectors * kLanes, dz);
            Vec<Real> all = add(dz, dn);
            if (a.reset_after) {
                const Vec<Real> dk = mul(r, dn);
                const Vec<Real> dr = mul(mul(dn, load_some(tape + 3 * H, left)), mul(r, sub(one, r)));
                store_some(out, left, dr);
                store_some(out + 3 * H, left, dk);
                add_to(a.dbias + j, left, dr);
                add_to(a.dbias + 3 * H + j, left, dk);
                store(sent, dr);
                store(sent + 2 * vectors * kLanes, dk);
                all = add(all, add(dr, dk));
            } else {
                store(a.sent_n[t % 2] + static_cast<size_t>(tile) * kTile * B +
                          (static_cast<size_t>(b) * vectors + v) * kLanes,
                      dn);
                store_some(a.back + at, left, zero);
            }
            if (is_nan(mul(all, zero))) __atomic_store_n(a.wild + row + b, uint8_t{1}, __ATOMIC_RELAXED);
        });
        m.wait(m.team);
        // Who needs the gradient of its message: all where one is no number, as 0 * inf is none either.
        own([&](uint32_t, uint32_t, uint32_t b, uint32_t, uint32_t j, uint32_t left) {
            const size_t at = static_cast<size_t>(b) * H + j;
            uint32_t bits = 0xffff;
            if (!a.every && !__atomic_load_n(a.wild + row + b, __ATOMIC_RELAXED)) {
                if (t) {
                    const Vec<Real> v = sub(load_some(u_old + at, left), load_some(a.theta + j, left));
                    bits = not_zero<Real>(load_some(o_old + at, left));
                    if (a.event != Event::always && a.height != 0) {
                        const Vec<Real> size = max(v, sub(zero, v));
                        bits |= ~(not_le(size, set1(a.half_width)) & ~is_nan(size));
                    }
                } else if (!a.wants_y0) {
                    bits = a.reset_after ? 0 : not_zero<Real>(load_some(a.y0 + at, left));
                }
            }
            bits &= first_lanes(left);
            const uint32_t near = j / kNear, lane = j % kNear;
            uint32_t& count = a.need.count[static_cast<size_t>(near) * B + b];
            if (lane == 0) count = 0;
            if (lane == 0 && b == 0) a.need.any[near] = 0;
            a.need.any[near] |= bits << lane;
            uint32_t* index = a.need.index + b * a.need.stride + static_cast<size_t>(near) * kNear;
            for (; bits; bits &= bits - 1) index[count++] = lane + static_cast<uint32_t>(__builtin_ctz(bits));
            if (lane != 0 || left <= kLanes)
                for (uint32_t k = count; k % 4; ++k) index[k] = index[count - 1];
        });
        if (!a.reset_after) {
            dots(a.hidden_n, a.sent_n[t % 2], a.back, t % 2);  // of r * y
            own([&](uint32_t tile, uint32_t vectors, uint32_t b, uint32_t v, uint32_t j, uint32_t left) {
                const size_t at = static_cast<size_t>(b) * H + j;
                const Vec<Real> r = load_some(a.tape + (row + b) * 4 * H + j, left);
                const Vec<Real> back = load_some(a.back + at, left);
                const Vec<Real> dr = mul(mul(back, load_some(y_old + at, left)), mul(r, sub(one, r)));
                store_some(a.gates + (row + b) * 4 * H + j, left, dr);
                if (is_nan(mul(dr, zero))) __atomic_store_n(a.wild + row + b, uint8_t{1}, __ATOMIC_RELAXED);
                add_to(a.dbias + j, left, dr);
                add_to(a.dy + at, left, mul(r, back));
                store(a.sent[t % 2] + static_cast<size_t>(tile) * kTile * 2 * B +
                          (static_cast<size_t>(b) * 2 * vectors + v) * kLanes,
                      dr);
            });
            m.wait(m.team);
        }
        dots(a.hidden, a.sent[t % 2], a.dy, t % 2);
    }
}

template <class Real>
static void outer(const OuterArgs<Real>& a, const Member& m) {
    const Part part(count_of_tiles(a.units), m);
    const uint32_t chunk = outer_chunk(a.rows);
    Real* g = a.room + static_cast<size_t>(m.number) * chunk * 3 * kTile;
    uint32_t* cursor = a.cursor + static_cast<size_t>(m.number) * a.cols;
    for (uint32_t tile = part.first; tile < part.last; ++tile) {
        const uint32_t vectors = tile_vectors(a.units, tile), n = a.gates * vectors;
        for (uint32_t c = 0; c < a.cols; ++c) cursor[c] = a.start[c];
        for (uint32_t first = 0; first < a.rows; first += chunk) {
            const uint32_t last = a.rows - first < chunk ? a.rows : first + chunk;
            for (uint32_t r = first; r < last; ++r)
                for (uint32_t i = 0; i < n; ++i) {
                    const uint32_t unit = tile * kTile + i % vectors * kLanes;
                    store(g + (static_cast<size_t>(r - first) * n + i) * kLanes,
                          load_some(a.g + r * a.stride + a.part[i / vectors] + unit, a.units - unit));
                }
            for (uint32_t col = 0; col < a.cols; col += kLanes) {
                const uint32_t cols = a.cols - col < kLanes ? a.cols - col : kLanes;
                alignas(64) Real sums[kLanes * 3 * kTile];
                for (uint32_t c = 0; c < cols; ++c) {
                    Real* to = sums + static_cast<size_t>(c) * n * kLanes;
                    for (uint32_t i = 0; i < n; ++i) store(to + i * kLanes, set1(Real(0)));
                    uint32_t& at = cursor[col + c];
                    uint32_t end = a.start[col + c + 1];
                    if (last < a.rows)
                        for (end = at; end < a.start[col + c + 1] && a.row[end] < last;) ++end;
                    with_width(n, [&](auto width) {
                        add_rows<decltype(width)::value>(to, g - static_cast<size_t>(first) * n * kLanes, n, a.row + at,
                                                         a.value + at, end - at);
                    });
                    at = end;
                }
                for (uint32_t i = 0; i < n; ++i) {
                    const uint32_t unit = tile * kTile + i % vectors * kLanes;
                    const uint32_t rows = a.units - unit < kLanes ? a.units - unit : kLanes;
                    for (uint32_t r = 0; r < rows; ++r) {
                        Real* to = a.out + (static_cast<size_t>(i / vectors) * a.units + unit + r) * a.cols + col;
                        const Real* from = sums + i * kLanes + r;
                        if (first == 0)
                            for (uint32_t c = 0; c < cols; ++c) to[c] = from[static_cast<size_t>(c) * n * kLanes];
                        else
                            for (uint32_t c = 0; c < cols; ++c) to[c] += from[static_cast<size_t>(c) * n * kLanes];
                    }
                }
            }
        }
    }
}

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
