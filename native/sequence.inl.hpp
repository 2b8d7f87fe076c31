// Training: one layer over a whole sequence, forward with a tape and backward, reading only what events make necessary
// (docs/equations.md, "Sparse back-propagation through time").
//
// A weight is transposed once for a sequence (`Transposed`). A tile of it, kTile units of every gate against one input,
// is one contiguous row of at most twelve vectors: the forward adds rows of the units that spoke to sums in registers,
// the backward multiplies the same rows with the tile's gradients, for the units that need theirs. Work is shared by
// tiles; a sum has one order, whoever makes it.
#pragma once
#include "blocks.inl.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

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

template <class Real>
SF_INLINE const Real* tile_of(const Transposed<Real>& w, uint32_t tile) {
    return w.values + static_cast<size_t>(tile) * kTile * w.gates * w.cols;
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
static void sift(const SiftArgs<Real>& a, const Member& m) {
    const Sifted<Real>& s = a.out;
    const Part part(count_of_segments(s.cols), m);
    for (uint32_t p = part.first; p < part.last; ++p) {
        const uint32_t col = p * kSegment, cols = s.cols - col < kSegment ? s.cols - col : kSegment;
        uint32_t* start = s.start + p * (static_cast<size_t>(s.rows) + 1);
        uint32_t *lane = s.lane + p * s.stride, *row = s.row + p * s.stride;
        Real* value = s.value + p * s.stride;
        uint32_t n = 0;
        for (uint32_t r = 0; r < s.rows; ++r) {
            start[r] = n;
            const Real* x = r < a.head_rows ? a.head + static_cast<size_t>(r) * s.cols
                                            : a.rest + static_cast<size_t>(r - a.head_rows) * s.cols;
            const bool whole = a.wild && a.wild[r];
            for (uint32_t c = 0; c < cols; c += kLanes) {
                Vec<Real> v = load_some(x + col + c, cols - c);
                const uint32_t bits = (whole ? 0xffff : not_zero<Real>(v)) & first_lanes(cols - c);
                if (!bits) continue;
                if (a.scale) v = mul(v, load_some(a.scale + r * a.scale_stride + col + c, cols - c));
                for (uint32_t i = 0; i < kLanes; ++i) row[n + i] = r;
                n += compress(bits, c, v, lane + n, value + n);
            }
        }
        start[s.rows] = n;
    }
}

/// f(part, where its entries begin, how many) of a row.
template <class Real>
static void input_product(const InputProductArgs<Real>& a, const Member& m) {
    if (a.dense) return input_product_of_rows(a, m);
    if (a.blocks.start) return input_product_of_events(a, m);
    const Transposed<Real>& w = a.weight;
    const Part part(count_of_tiles(w.units), m);
    const uint32_t chunk = product_rows(a.x.rows);
    Real* acc = a.room + m.number * a.room_of_member;
    for (uint32_t tile = part.first; tile < part.last; ++tile) {
        const uint32_t vectors = tile_vectors(w.units, tile), n = w.gates * vectors;
        for (uint32_t first = 0; first < a.x.rows; first += chunk) {
            const uint32_t last = a.x.rows - first < chunk ? a.x.rows : first + chunk;
            const auto each = [&](auto f) {
                for (uint32_t r = first; r < last; ++r)
                    for (uint32_t i = 0; i < n; ++i) {
                        const uint32_t unit = tile * kTile + i % vectors * kLanes;
                        f(acc + (static_cast<size_t>(r - first) * n + i) * kLanes, r, i / vectors * w.units + unit,
                          w.units - unit);
                    }
            };
            each([&](Real* to, uint32_t, uint32_t at, uint32_t left) { store(to, load_some(a.bias + at, left)); });
            with_width(n, [&](auto width) {
                constexpr uint32_t N = decltype(width)::value;
                for (uint32_t p = 0; p < count_of_segments(w.cols); ++p)
                    for (uint32_t r = first; r < last; ++r) {
                        const uint32_t* start = a.x.start + p * (static_cast<size_t>(a.x.rows) + 1) + r;
                        const size_t at = p * a.x.stride + start[0];
                        if (start[1] != start[0])
                            add_rows<N>(acc + static_cast<size_t>(r - first) * N * kLanes,
                                        tile_of(w, tile) + static_cast<size_t>(p) * kSegment * N * kLanes, N,
                                        a.x.lane + at, a.x.value + at, start[1] - start[0]);
                    }
            });
            each([&](Real* from, uint32_t r, uint32_t at, uint32_t left) {
                store_some(a.out + r * a.stride + at, left, load(from));
            });
        }
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
    const Strips part(H, a.blocks.start ? a.blocks.strips : 0, m);
    Real* acc = a.room + m.number * a.room_of_sums;
    const Vec<Real> zero = set1(Real(0));
    const auto says = [&](const Spoken<Real>& list, uint32_t b, uint32_t j, uint32_t left, const Vec<Real>& y) {
        append(list, b, j, (a.every ? 0xffffu : not_zero<Real>(y)) & first_lanes(left), y);
    };
    /// f(tile, sample, sums, their distance from unit to unit in vectors, and from gate to gate) of the bias of the
    /// last gate + W x, for the member's tiles and all samples.
    const auto products = [&](const Transposed<Real>& w, const BlockWeight<Real>& blocks, const Spoken<Real>& x,
                              const Real* value, const Real* bias, const auto& f) {
        const uint32_t gates = w.gates;
        const auto begin = [&](Real* to, uint32_t gate, uint32_t unit) {
            store(to, bias && gate + 1 == gates ? load_some(bias + unit, H - unit) : zero);
        };
        if (!blocks.start) {
            for (uint32_t tile = part.first_tile; tile < part.last_tile; ++tile) {
                const uint32_t vectors = tile_vectors(H, tile), n = gates * vectors;
                for (uint32_t i = 0; i < B * n; ++i)
                    begin(acc + static_cast<size_t>(i) * kLanes, i % n / vectors, tile * kTile + i % vectors * kLanes);
                with_width(
                    n, [&](auto width) { add_products<decltype(width)::value>(acc, tile_of(w, tile), H, x, value); });
                for (uint32_t b = 0; b < B; ++b) f(tile, b, acc + static_cast<size_t>(b) * n * kLanes, 1u, vectors);
            }
            return;
        }
        const uint32_t rows = kTile / kLanes * gates, all = count_of_groups(H) * gates;
        const uint32_t last = part.last_tile * rows < all ? part.last_tile * rows : all;
        for (uint32_t b = 0; b < B; ++b) {  // all sums of a sample stay in the first level of cache
            for (uint32_t i = part.first_tile * rows; i < last; ++i)
                begin(acc + static_cast<size_t>(i) * kLanes, i % gates, i / gates * kLanes);
            for (uint32_t strip = part.first; strip < part.last; ++strip)
                for (uint32_t s = 0; s < count_of_segments(H); ++s) {
                    const size_t at = b * x.stride + static_cast<size_t>(s) * kSegment;
                    add_blocks(acc, blocks, strip, s * kSegment, x.index + at, value + at,
                               x.count[static_cast<size_t>(s) * B + b]);
                }
            for (uint32_t tile = part.first_tile; tile < part.last_tile; ++tile)
                f(tile, b, acc + static_cast<size_t>(tile) * rows * kLanes, gates, 1u);
        }
    };
    const auto units = [&](uint32_t tile, auto f) {  // vector by vector of the tile
        for (uint32_t v = 0; v < tile_vectors(H, tile); ++v) {
            const uint32_t j = tile * kTile + v * kLanes;
            f(v, j, H - j);
        }
    };
    for (uint32_t tile = part.first_tile; tile < part.last_tile; ++tile)
        for (uint32_t b = 0; b < B; ++b)
            units(tile, [&](uint32_t, uint32_t j, uint32_t left) {
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
            products(a.hidden, a.blocks, said, said.value, nullptr,
                     [&](uint32_t tile, uint32_t b, const Real* sums, uint32_t by_unit, uint32_t by_gate) {
                         units(tile, [&](uint32_t v, uint32_t j, uint32_t left) {
                             for (uint32_t gate = 0; gate < 2; ++gate) {
                                 const Vec<Real> sum = load(sums + (v * by_unit + gate * by_gate) * kLanes);
                                 Real* at = tape(b, gate, j);
                                 store_some(at, left, sigmoid(add(load_some(at, left), sum)));
                             }
                         });
                         const size_t at = b * said.stride + static_cast<size_t>(tile) * kSegment;
                         const Real* r = tape(b, 0, tile * kSegment);
                         for (uint32_t k = 0; k < said.count[static_cast<size_t>(tile) * B + b]; ++k)
                             a.scaled[at + k] = r[said.index[at + k]] * said.value[at + k];
                     });
            m.wait(m.team);
        }
        const auto finish = [&](uint32_t tile, uint32_t b, const Real* sums, uint32_t by_unit, uint32_t by_gate) {
            units(tile, [&](uint32_t v, uint32_t j, uint32_t left) {
                const auto product = [&](uint32_t gate) {
                    return load(sums + (v * by_unit + gate * by_gate) * kLanes);
                };
                Real *at_r = tape(b, 0, j), *at_z = tape(b, 1, j), *at_n = tape(b, 2, j), *at_k = tape(b, 3, j);
                Vec<Real> z = load_some(at_z, left), n = load_some(at_n, left);
                if (a.reset_after) {
                    const Vec<Real> r = sigmoid(add(load_some(at_r, left), product(0)));
                    const Vec<Real> k = product(2);
                    z = sigmoid(add(z, product(1)));
                    n = tanh(fma(r, k, n));
                    store_some(at_r, left, r);
                    store_some(at_z, left, z);
                    store_some(at_k, left, k);
                } else {
                    n = tanh(add(n, product(0)));
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
                if (a.o) {
                    store_some(a.u + now, left, u);
                    store_some(a.o + now, left, o);
                    store_some(a.y + now, left, y);
                }
                store_some(a.h + at, left, carried(a, u, o, theta));
                says(next, b, j, left, y);
            });
        };
        if (a.reset_after)
            products(a.hidden, a.blocks, said, said.value, a.bias_n, finish);
        else
            products(a.hidden_n, a.blocks_n, said, a.scaled, nullptr, finish);
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
    // Every vector of units of this member, as they lie in memory; or tile by tile, where what is sent is spread out.
    const auto own = [&](auto f) {
        const uint32_t tiles_now = a.all ? 1 : part.last - part.first;
        for (uint32_t first = part.first; first < part.last; first += tiles_now)
            for (uint32_t b = 0; b < B; ++b)
                for (uint32_t tile = first; tile < first + tiles_now; ++tile) {
                    const uint32_t vectors = tile_vectors(H, tile);
                    for (uint32_t v = 0; v < vectors; ++v) {
                        const uint32_t j = tile * kTile + v * kLanes;
                        f(tile, vectors, b, v, j, H - j);
                    }
                }
    };
    const uint32_t parts = count_of_near(H), first_part = part.first * (kTile / kNear);
    const uint32_t end = part.last * (kTile / kNear), last_part = end < parts ? end : parts;
    const uint32_t ahead = (kNear + B - 1) / B;
    const uint32_t groups = count_of_groups(H);
    const size_t all = static_cast<size_t>(groups) * kLanes;
    /// To where the product with W^T finds it: one vector of units' gradients, of one of `count` gates.
    const auto send = [&](Real* sent, uint32_t count, uint32_t gate, uint32_t tile, uint32_t vectors, uint32_t b,
                          uint32_t v, const Vec<Real>& x) {
        if (a.all) {
            const size_t row = static_cast<size_t>(tile * (kTile / kLanes) + v) * count + gate;
            Real* to = sent + in_lanes(b, static_cast<size_t>(groups) * count, row);
            alignas(64) Real lanes[kLanes];
            store(lanes, x);
            for (uint32_t i = 0; i < kLanes; ++i) to[i * kLanes] = lanes[i];
        } else if (a.blocks.start) {
            store(sent + (b * all + tile * kTile + v * kLanes) * count + gate * kLanes, x);
        } else {
            store(sent + static_cast<size_t>(tile) * kTile * count * B +
                      (static_cast<size_t>(b) * count * vectors + gate * vectors + v) * kLanes,
                  x);
        }
    };
    /// out[b, j] += row j of W * sent of sample b, of all that are this member's.
    const uint32_t first_own = part.first * kTile, last_own = part.last * kTile < H ? part.last * kTile : H;
    uint32_t* bounds = a.bounds + static_cast<size_t>(m.number) * groups * 6;
    uint32_t* bounds_n = bounds + static_cast<size_t>(groups) * 4;  // behind those of two gates
    const auto all_products = [&](const BlockWeight<Real>& w, const Real* sent, Real* out, size_t row) {
        every_turned_product(
            w, w.by_row == a.blocks.by_row ? bounds : bounds_n, first_own, last_own, sent, B,
            a.room + m.number * kTogether * all * kLanes,
            [&](uint32_t b) { return __atomic_load_n(a.wild + row + b, __ATOMIC_RELAXED) != 0; },
            [&](uint32_t b, uint32_t j, const Vec<Real>& x) {
                add_to(out + static_cast<size_t>(b) * H + j, last_own - j, x);
            });
    };
    const auto dots_of_blocks = [&](const BlockWeight<Real>& w, const Real* sent, Real* out, size_t row) {
        for (uint32_t b = 0; b < B; ++b) {
            const Real* q = sent + b * all * w.gates;
            const bool wild = __atomic_load_n(a.wild + row + b, __ATOMIC_RELAXED);
            for (uint32_t s = first_part; s < last_part; ++s) {
                const uint32_t count = a.need.count[static_cast<size_t>(s) * B + b];
                const uint32_t* index = a.need.index + b * a.need.stride + static_cast<size_t>(s) * kNear;
                Real* to = out + static_cast<size_t>(b) * H + s * kNear;
                const auto dot = [&](uint32_t k) { return dot_blocks(w, s * kNear + index[k], q, wild); };
                for (uint32_t k = 0; k < count; k += 4) {
                    Real four[4] = {0, 0, 0, 0};
                    add_sums(four, dot(k), dot(k + 1), dot(k + 2), dot(k + 3));
                    for (uint32_t i = 0; i < 4 && k + i < count; ++i) to[index[k + i]] += four[i];
                }
            }
        }
    };
    /// out[b, j] += row j of W * sent of sample b, where needed.
    const auto dots = [&](const Transposed<Real>& w, const BlockWeight<Real>& blocks, const Real* sent, Real* out,
                          size_t row, bool upwards) {
        if (a.all) return all_products(blocks, sent, out, row);
        if (blocks.start) return dots_of_blocks(blocks, sent, out, row);
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
    if (a.all) {
        find_bounds(a.blocks, first_own, last_own, bounds);
        if (!a.reset_after) find_bounds(a.blocks_n, first_own, last_own, bounds_n);
    }
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
        const Real* y_old = t ? a.y + (t - 1) * step : a.y0;
        const size_t row = static_cast<size_t>(t) * B;
        own([&](uint32_t tile, uint32_t vectors, uint32_t b, uint32_t v, uint32_t j, uint32_t left) {
            const size_t at = static_cast<size_t>(b) * H + j, now = t * step + at;
            const Real* tape = a.tape + (row + b) * 4 * H + j;
            if (a.all) {  // what the next sample reads and writes: too many short runs to be foreseen
                for (uint32_t i = 0; i < 4; ++i) {
                    __builtin_prefetch(tape + (4 + i) * H, 0, 3);
                    __builtin_prefetch(a.gates + (row + b + 1) * 4 * H + i * H + j, 1, 3);
                }
                __builtin_prefetch(a.u + now + H, 0, 3);
                if (a.grad_y) __builtin_prefetch(a.grad_y + now + H, 0, 3);
            }
            const Vec<Real> r = load_some(tape, left), z = load_some(tape + H, left), n = load_some(tape + 2 * H, left);
            const Vec<Real> theta = load_some(a.theta + j, left), dh = load_some(a.dh + at, left);
            const Vec<Real> u = load_some(a.u + now, left), o = event(a, sub(u, theta));
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
            Vec<Real> h = load_some((u_old ? u_old : a.h0) + at, left);
            if (u_old) h = carried(a, h, event(a, sub(h, theta)), theta);
            const Vec<Real> dz = mul(mul(sub(h, n), du), mul(z, sub(one, z)));
            const Vec<Real> dn = mul(mul(sub(one, z), du), fma(sub(zero, n), n, one));
            store_some(a.dh + at, left, fma(z, du, kept));
            store_some(a.dy + at, left, a.reset == Reset::output ? sub(zero, du) : zero);
            Real* out = a.gates + (row + b) * 4 * H + j;
            store_some(out + H, left, dz);
            store_some(out + 2 * H, left, dn);
            add_to(a.dbias + H + j, left, dz);
            add_to(a.dbias + 2 * H + j, left, dn);
            const auto sends = [&](uint32_t gate, const Vec<Real>& x) {
                send(a.sent[t % 2], gates, gate, tile, vectors, b, v, x);
            };
            sends(1, dz);
            Vec<Real> all = add(dz, dn);
            if (a.reset_after) {
                const Vec<Real> dk = mul(r, dn);
                const Vec<Real> dr = mul(mul(dn, load_some(tape + 3 * H, left)), mul(r, sub(one, r)));
                store_some(out, left, dr);
                store_some(out + 3 * H, left, dk);
                add_to(a.dbias + j, left, dr);
                add_to(a.dbias + 3 * H + j, left, dk);
                sends(0, dr);
                sends(2, dk);
                all = add(all, add(dr, dk));
            } else {
                send(a.sent_n[t % 2], 1, 0, tile, vectors, b, v, dn);
                store_some(a.back + at, left, zero);
            }
            if (is_nan(mul(all, zero))) __atomic_store_n(a.wild + row + b, uint8_t{1}, __ATOMIC_RELAXED);
        });
        m.wait(m.team);
        // Who needs the gradient of its message: all where one is no number, as 0 * inf is none either.
        if (!a.all)
            own([&](uint32_t, uint32_t, uint32_t b, uint32_t, uint32_t j, uint32_t left) {
                const size_t at = static_cast<size_t>(b) * H + j;
                uint32_t bits = 0xffff;
                if (!a.every && !__atomic_load_n(a.wild + row + b, __ATOMIC_RELAXED)) {
                    if (t) {
                        const Vec<Real> v = sub(load_some(u_old + at, left), load_some(a.theta + j, left));
                        bits = not_zero<Real>(event(a, v));
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
            dots(a.hidden_n, a.blocks_n, a.sent_n[t % 2], a.back, row, t % 2);  // of r * y
            own([&](uint32_t tile, uint32_t vectors, uint32_t b, uint32_t v, uint32_t j, uint32_t left) {
                const size_t at = static_cast<size_t>(b) * H + j;
                const Vec<Real> r = load_some(a.tape + (row + b) * 4 * H + j, left);
                const Vec<Real> back = load_some(a.back + at, left);
                const Vec<Real> dr = mul(mul(back, load_some(y_old + at, left)), mul(r, sub(one, r)));
                store_some(a.gates + (row + b) * 4 * H + j, left, dr);
                if (is_nan(mul(dr, zero))) __atomic_store_n(a.wild + row + b, uint8_t{1}, __ATOMIC_RELAXED);
                add_to(a.dbias + j, left, dr);
                add_to(a.dy + at, left, mul(r, back));
                send(a.sent[t % 2], 2, 0, tile, vectors, b, v, dr);
            });
            m.wait(m.team);
        }
        dots(a.hidden, a.blocks, a.sent[t % 2], a.dy, row, t % 2);
    }
}

/// to[lane[k]] += value[k] * from[row[k] - first], rows of N vectors, for k < n.
template <uint32_t N, class Real>
SF_INLINE void add_outer(Real* to, const Real* from, uint32_t first, const uint32_t* lane, const uint32_t* row,
                         const Real* value, uint32_t n) {
    for (uint32_t k = 0; k < n; ++k) {
        Real* sums = to + static_cast<size_t>(lane[k]) * N * kLanes;
        const Real* g = one_base(from + static_cast<size_t>(row[k] - first) * N * kLanes);
        const Vec<Real> x = set1(value[k]);
        for (uint32_t i = 0; i < N; ++i)
            store(sums + i * kLanes, fma(load(g + i * kLanes), x, load(sums + i * kLanes)));
    }
}

template <class Real>
static void outer(const OuterArgs<Real>& a, const Member& m) {
    const Sifted<Real>& x = a.x;
    const uint32_t groups = count_of_groups(a.units), parts = count_of_segments(x.cols), chunk = outer_chunk(x.rows);
    const Part part((groups + 1) / 2, m);
    Real* g = a.room + static_cast<size_t>(m.number) * chunk * a.gates * kPair;
    alignas(64) Real sums[kSegment * 3 * kPair];
    for (uint32_t pair = part.first; pair < part.last; ++pair) {
        const uint32_t vectors = 2 * pair + 1 < groups ? 2 : 1, n = a.gates * vectors;
        const auto unit_of = [&](uint32_t i) { return pair * kPair + i / a.gates * kLanes; };
        const auto live = [&](uint32_t i, uint32_t p) {
            return a.live ? a.live[(static_cast<size_t>(pair) * 2 * a.gates + i) * parts + p] : ~uint64_t{0};
        };
        for (uint32_t first = 0; first < x.rows; first += chunk) {
            const uint32_t last = x.rows - first < chunk ? x.rows : first + chunk;
            for (uint32_t r = first; r < last; ++r)
                for (uint32_t i = 0; i < n; ++i) {
                    store(g + (static_cast<size_t>(r - first) * n + i) * kLanes,
                          load_some(a.g + r * a.stride + a.part[i % a.gates] + unit_of(i), a.units - unit_of(i)));
                }
            for (uint32_t p = 0; p < parts; ++p) {
                const uint32_t cols = x.cols - p * kSegment < kSegment ? x.cols - p * kSegment : kSegment;
                const uint32_t* start = x.start + p * (static_cast<size_t>(x.rows) + 1);
                const uint32_t* row = x.row + p * x.stride;
                const Real* value = x.value + p * x.stride;
                for (uint32_t i = 0; i < cols * n; ++i) store(sums + i * kLanes, set1(Real(0)));
                const uint32_t at = start[first];
                with_width(n, [&](auto width) {
                    constexpr uint32_t N = decltype(width)::value;
                    if constexpr (N <= 6)
                        add_outer<N>(sums, g, first, x.lane + p * x.stride + at, row + at, value + at,
                                     start[last] - at);
                });
                for (uint32_t i = 0; a.live && i < n; ++i)
                    for (uint32_t c = 0; c < cols; ++c)
                        if (!(live(i, p) >> c & 1)) store(sums + (c * n + i) * kLanes, set1(Real(0)));
                for (uint32_t i = 0; i < n; ++i) {
                    const uint32_t unit = unit_of(i), rows = a.units - unit < kLanes ? a.units - unit : kLanes;
                    for (uint32_t r = 0; r < rows; ++r) {
                        Real* to =
                            a.out + (static_cast<size_t>(i % a.gates) * a.units + unit + r) * x.cols + p * kSegment;
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
