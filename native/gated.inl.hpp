// Training of GRU, LSTM and the plain recurrent unit over a whole sequence, forward with a tape and backward
// (docs/equations.md). The input product, and the products that make the gradients of the weights, are one matrix
// product each over all steps and not made here.
//
// What is left is one product of all samples' states with the recurrent weight per step. A member packs its panels of
// the weight once, at the start. A panel's row and some samples' values of one input are the factors of a block of sums
// in registers; a chunk of the panel is read from the first level of cache by all blocks of samples but the first,
// while the next chunk is on its way to the second.
#pragma once
#include "sequence.inl.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

// Where a vector is an array, what is made of it often is a function: its code would be long.
#ifdef SPARSEFOLD_GATED_DOUBLES
#define SF_SHORT static __attribute__((noinline))
#else
#define SF_SHORT SF_INLINE
#endif
template <class Real>
SF_SHORT Vec<Real> get(const Real* p, uint32_t n) {
    return load_some(p, n);
}
template <class Real>
SF_SHORT void put(Real* p, uint32_t n, const Vec<Real>& x) {
    store_some(p, n, x);
}
template <class V>
SF_SHORT V gate(const V& x) {
    return sigmoid(x);
}
template <class V>
SF_SHORT V bounded(const V& x) {
    return tanh(x);
}
/// s (1 - s) and 1 - s^2: slopes of both, from their values.
template <class V>
SF_SHORT V gate_slope(const V& s, const V& one) {
    return mul(s, sub(one, s));
}
template <class V>
SF_SHORT V bounded_slope(const V& s, const V& one) {
    return fma(sub(sub(one, one), s), s, one);
}
template <class Real>
SF_SHORT Vec<Real> between(const Vec<Real>& a, const Vec<Real>& b, const Vec<Real>& w) {
    return lerp<Real>(a, b, w);
}

constexpr uint32_t kFetched = 16;  // inputs between two looks at what comes next

/// Lines of the weight that are read next, asked for bit by bit.
template <class Real>
struct Coming {
    const Real* at;
    uint32_t lines;  // for each kFetched inputs; 0: all weights stay in the cache
};

/// acc (samples, N vectors), M samples and Now vectors of them, += sum over k < n of row k * x[k * stride + sample].
template <uint32_t N, uint32_t Now, uint32_t M, class Real>
SF_INLINE void add_block(Real* acc, const Real* rows, const Real* x, size_t stride, uint32_t n, Coming<Real> coming) {
    constexpr uint32_t kFit = BlockOf<Real>::sums / (Now * M), kParts = kFit >= 4 ? 4 : kFit >= 2 ? 2 : 1;
    Vec<Real> total[kParts][M * Now];
#pragma GCC unroll 32
    for (uint32_t i = 0; i < M * Now; ++i) total[0][i] = load(acc + (i / Now * N + i % Now) * kLanes);
#pragma GCC unroll 4
    for (uint32_t p = 1; p < kParts; ++p)
#pragma GCC unroll 32
        for (uint32_t i = 0; i < M * Now; ++i) total[p][i] = set1(Real(0));
    const auto add_input = [&](uint32_t k, Vec<Real>* to) {
        const Real* row = one_base(rows + static_cast<size_t>(k) * N * kLanes);
        const Real* value = x + k * stride;
        Vec<Real> w[Now];
#pragma GCC unroll 4
        for (uint32_t i = 0; i < Now; ++i) w[i] = load(row + i * kLanes);
#pragma GCC unroll 32
        for (uint32_t s = 0; s < M; ++s) {
            const Vec<Real> v = set1(value[s]);
#pragma GCC unroll 4
            for (uint32_t i = 0; i < Now; ++i) to[s * Now + i] = fma(w[i], v, to[s * Now + i]);
        }
    };
    for (uint32_t first = 0; first < n; first += kFetched) {
        for (uint32_t i = 0; i < coming.lines; ++i, coming.at += 64 / sizeof(Real)) __builtin_prefetch(coming.at, 0, 2);
        const uint32_t last = n - first < kFetched ? n : first + kFetched;
        uint32_t k = first;
        for (; k + kParts <= last; k += kParts)
#pragma GCC unroll 4
            for (uint32_t p = 0; p < kParts; ++p) add_input(k + p, total[p]);
        for (; k < last; ++k) add_input(k, total[0]);
    }
#pragma GCC unroll 2
    for (uint32_t half = kParts / 2; half; half /= 2)
#pragma GCC unroll 4
        for (uint32_t p = 0; p < half; ++p)
#pragma GCC unroll 32
            for (uint32_t i = 0; i < M * Now; ++i) total[p][i] = add(total[p][i], total[p + half][i]);
#pragma GCC unroll 32
    for (uint32_t i = 0; i < M * Now; ++i) store(acc + (i / Now * N + i % Now) * kLanes, total[0][i]);
}

/// acc (samples, N vectors) += panel x, x (depth, stride) of which each row begins with the samples; `next` is the
/// panel that is read after this one, null where all weights stay in the cache.
template <uint32_t N, class Real>
static __attribute__((noinline)) void add_panel(Real* acc, const Real* panel, uint32_t depth, const Real* x,
                                                uint32_t stride, uint32_t samples, const Real* next) {
    constexpr uint32_t kNow = BlockOf<Real>::vectors < N ? BlockOf<Real>::vectors : N,
                       kMost = BlockOf<Real>::sums / kNow;
    constexpr uint32_t kChunk = (N > 3 ? 4 : 6) * kFetched;  // of which two fit the first level
    const uint32_t groups = (samples + kMost - 1) / kMost;
    if (!groups) return;
    for (uint32_t first = 0; first < depth; first += kChunk) {
        const uint32_t n = depth - first < kChunk ? depth - first : kChunk;
        const Real* rows = panel + static_cast<size_t>(first) * N * kLanes;
        constexpr uint32_t kLines = N * kFetched * kLanes * sizeof(Real) / 64;
        const uint32_t lines = next ? (kLines + groups - 1) / groups : 0;
        Coming<Real> coming{first + n < depth ? rows + static_cast<size_t>(n) * N * kLanes : next, 0};
        for (uint32_t group = 0; group < groups; ++group) {
            const uint32_t from = share(samples, group, groups), count = share(samples, group + 1, groups) - from;
            with_number<kMost>(count, [&](auto width) {
                for (uint32_t i = 0; i < N; i += kNow) {
                    coming.lines = i ? 0 : lines;
                    add_block<N, kNow, decltype(width)::value>(
                        acc + (static_cast<size_t>(from) * N + i) * kLanes, rows + i * kLanes,
                        x + static_cast<size_t>(first) * stride + from, stride, n, coming);
                }
            });
            coming.at += static_cast<size_t>((n + kFetched - 1) / kFetched) * lines * (64 / sizeof(Real));
        }
    }
}

template <class Real>
SF_INLINE Real* panel_of(const Panels<Real>& w, uint32_t panel) {
    return w.values + static_cast<size_t>(panel) * w.gates * w.vectors * kLanes * w.depth;
}

/// Fills a member's panels from a weight of `gates` matrices (units, depth).
template <class Real>
static void pack_rows(const Panels<Real>& w, const Real* weight, const Part& part) {
    const uint32_t width = w.gates * w.vectors * kLanes;
    for (uint32_t panel = part.first; panel < part.last; ++panel)
        for (uint32_t col = 0; col < w.depth; col += kLanes)
            for (uint32_t i = 0; i < w.gates * w.vectors; ++i) {
                const uint32_t unit = (panel * w.vectors + i % w.vectors) * kLanes;
                const uint32_t rows = unit >= w.units ? 0 : w.units - unit < kLanes ? w.units - unit : kLanes;
                const Real* from =
                    weight + (static_cast<size_t>(i / w.vectors) * w.units + (rows ? unit : 0)) * w.depth + col;
                turn(from, w.depth, rows, w.depth - col < kLanes ? w.depth - col : kLanes,
                     panel_of(w, panel) + static_cast<size_t>(col) * width + i * kLanes, width);
            }
}

/// The same from the transposed of a weight (depth, units).
template <class Real>
static void pack_columns(const Panels<Real>& w, const Real* weight, const Part& part) {
    for (uint32_t panel = part.first; panel < part.last; ++panel) {
        Real* to = panel_of(w, panel);
        for (uint32_t k = 0; k < w.depth; ++k)
            for (uint32_t v = 0; v < w.vectors; ++v, to += kLanes) {
                const uint32_t unit = (panel * w.vectors + v) * kLanes;
                const Real* from = weight + static_cast<size_t>(k) * w.units + unit;
                store(to, unit < w.units ? load_some(from, w.units - unit) : set1(Real(0)));
            }
    }
}

/// Lanes of x to a column of (units, batch).
template <class Real>
SF_SHORT void spread_out(Real* to, uint32_t batch, uint32_t left, const Vec<Real>& x) {
    alignas(64) Real lanes[kLanes];
    store(lanes, x);
    for (uint32_t i = 0; i < (left < kLanes ? left : kLanes); ++i) to[static_cast<size_t>(i) * batch] = lanes[i];
}

/// Zoneout: the share of what is new.
template <class Real>
SF_SHORT Vec<Real> fresh(const Real* mask, Real kept, size_t at, uint32_t left) {
    return mask ? get(mask + at, left) : set1(Real(1) - kept);
}
template <class Real>
SF_SHORT Vec<Real> zoned(const Vec<Real>& now, const Vec<Real>& old, const Real* mask, Real kept, size_t at,
                         uint32_t left) {
    if (mask) return between<Real>(old, now, get(mask + at, left));
    return kept != 0 ? between<Real>(now, old, set1(kept)) : now;
}

/// f(panel, whether it is the last one) of a member's panels, from one end or from the other: what was read last is
/// still in the cache.
template <class F>
SF_INLINE void each_panel(const Part& part, bool upwards, const F& f) {
    for (uint32_t i = part.first; i < part.last; ++i) {
        const uint32_t panel = upwards ? i : part.last - 1 - (i - part.first);
        f(panel, i + 1 < part.last ? (upwards ? panel + 1 : panel - 1) : panel);
    }
}

template <class Real>
SF_INLINE void add_panel_of(const Panels<Real>& w, Real* acc, uint32_t panel, uint32_t next, uint32_t first,
                            uint32_t depth, const Real* x, uint32_t batch, uint32_t live, const Part& part) {
    const uint32_t width = w.gates * w.vectors;
    const size_t at = static_cast<size_t>(first) * width * kLanes;
    const size_t bytes = static_cast<size_t>(part.last - part.first) * width * kLanes * depth * sizeof(Real);
    const Real *rows = panel_of(w, panel) + at, *coming = bytes > (1u << 20) ? panel_of(w, next) + at : nullptr;
    if (width == 3)
        add_panel<3>(acc, rows, depth, x, batch, live, coming);
    else
        add_panel<4>(acc, rows, depth, x, batch, live, coming);
}

template <class Real>
static void gated_forward(const GatedForwardArgs<Real>& a, const Member& m) {
    const uint32_t H = a.units, B = a.batch, width = tape_of(a.kind) * H;
    const size_t step = static_cast<size_t>(B) * H;
    const bool before = a.kind == Gated::gru_before, pair = a.kind == Gated::lstm;
    const bool in_blocks = a.blocks.start != nullptr;
    const Panels<Real>& last = before ? a.panels_n : a.panels;  // after which the state is known
    const Part part(count_of_panels(H, a.panels.vectors), m), last_part(count_of_panels(H, last.vectors), m);
    Real* acc = a.room + m.number * a.room_of_sums;
    const Vec<Real> zero = set1(Real(0));
    if (!in_blocks) {
        pack_rows(a.panels, a.weight, part);
        if (before) pack_rows(last, a.weight + 2 * H * static_cast<size_t>(H), last_part);
    }
    const auto units = [&](const Panels<Real>& w, uint32_t panel, const auto& f) {  // f(vector, unit, units left)
        for (uint32_t v = 0; v < w.vectors; ++v) {
            const uint32_t j = (panel * w.vectors + v) * kLanes;
            if (j < H) f(v, j, H - j);
        }
    };
    /// What a sum begins with, and f(sample, unit, units left, sums, their distance from gate to gate, tape) when it is
    /// made. x: the state of all samples, (units, batch) for panels and (batch, units) for blocks.
    const auto begin = [&](const Real* tape, uint32_t gate, uint32_t j) {
        const bool inside = a.kind == Gated::gru && gate == 2;  // what r multiplies has no x in it
        const Real* from = inside ? (a.bias_n ? a.bias_n + j : nullptr) : tape + gate * H + j;
        return from && j < H ? get(from, H - j) : zero;
    };
    const auto pass = [&](const Panels<Real>& w, const BlockWeight<Real>& blocks, const Part& own, uint32_t t,
                          uint32_t first_gate, const Real* x, uint32_t live, const auto& f) {
        const auto tape = [&](uint32_t b) { return a.tape + (static_cast<size_t>(t) * B + b) * width; };
        if (a.lanes) {
            const Part groups(count_of_groups(H), m);
            for (uint32_t group = groups.first; group < groups.last; ++group)
                every_tile(0, count_of_groups(live), live, [&](const auto& each) {
                    each([&](uint32_t, uint32_t first, uint32_t n) {
                        const Real* from = x + in_lanes(first, count_of_groups(H), 0);
                        bool wild = false;
                        for (uint32_t s = 0; s < n; ++s) wild |= __atomic_load_n(a.wild + first + s, __ATOMIC_RELAXED);
                        alignas(64) Real sums[kBlock], lines[4 * kBlock];
                        for (uint32_t gate = 0; gate < w.gates; ++gate) {
                            for (uint32_t i = 0; i < kLanes; ++i) store(sums + i * kLanes, zero);
                            add_row(sums, blocks, group * w.gates + gate, from);
                            if (wild) add_zeros(sums, blocks, group * w.gates + gate, from);
                            turn(sums, kLanes, kLanes, n, lines + gate * kBlock, kLanes);
                        }
                        const uint32_t j = group * kLanes;
                        for (uint32_t b = first; b < first + n; ++b) {
                            Real* line = lines + (b - first) * kLanes;
                            for (uint32_t gate = 0; gate < w.gates; ++gate) {
                                Real* sum = line + gate * kBlock;
                                store(sum, add(begin(tape(b), first_gate + gate, j), load(sum)));
                            }
                            f(b, j, H - j, line, kBlock, tape(b) + j);
                        }
                    });
                });
            return;
        }
        if (in_blocks) {
            const Strips strips(H, blocks.strips, m);
            const uint32_t of_tile = kTile / kLanes, end = strips.last_tile * of_tile, groups = count_of_groups(H);
            for (uint32_t b = 0; b < live; ++b) {
                const auto each = [&](const auto& then) {
                    for (uint32_t group = strips.first_tile * of_tile; group < (end < groups ? end : groups); ++group)
                        then(group * kLanes, acc + static_cast<size_t>(group) * w.gates * kLanes);
                };
                each([&](uint32_t j, Real* sums) {
                    for (uint32_t i = 0; i < w.gates; ++i) store(sums + i * kLanes, begin(tape(b), first_gate + i, j));
                });
                for (uint32_t strip = strips.first; strip < strips.last; ++strip)
                    add_blocks(acc, blocks, strip, 0, nullptr, x + static_cast<size_t>(b) * H, H);
                each([&](uint32_t j, const Real* sums) { f(b, j, H - j, sums, kLanes, tape(b) + j); });
            }
            return;
        }
        const uint32_t n = w.gates * w.vectors;
        each_panel(own, t % 2, [&](uint32_t panel, uint32_t next) {
            for (uint32_t b = 0; b < live; ++b)
                for (uint32_t i = 0; i < n; ++i)
                    store(acc + (static_cast<size_t>(b) * n + i) * kLanes,
                          begin(tape(b), first_gate + i / w.vectors, (panel * w.vectors + i % w.vectors) * kLanes));
            add_panel_of(w, acc, panel, next, 0, H, x, B, live, own);
            units(w, panel, [&](uint32_t v, uint32_t j, uint32_t left) {
                for (uint32_t b = 0; b < live; ++b)
                    f(b, j, left, acc + (static_cast<size_t>(b) * n + v) * kLanes, w.vectors * kLanes, tape(b) + j);
            });
        });
    };
    /// To where the next product finds it: a vector of one sample's state.
    const auto send = [&](Real* to, uint32_t b, uint32_t j, uint32_t left, const Vec<Real>& h) {
        if (a.lanes) {
            spread_out(to + in_lanes(b, count_of_groups(H), j / kLanes), kLanes, left, h);
            if (is_nan(mul(h, zero))) __atomic_store_n(a.wild + b, uint8_t{1}, __ATOMIC_RELAXED);
        } else if (!in_blocks) {
            spread_out(to + static_cast<size_t>(j) * B + b, B, left, h);
        }
    };
    for (uint32_t panel = last_part.first; panel < last_part.last; ++panel)
        units(last, panel, [&](uint32_t, uint32_t j, uint32_t left) {
            for (uint32_t b = 0; b < B; ++b) send(a.state[0], b, j, left, get(a.h0 + b * size_t{H} + j, left));
        });
    m.wait(m.team);
    for (uint32_t t = 0; t < a.steps; ++t) {
        const uint32_t live = a.live ? static_cast<uint32_t>(a.live[t]) : B;
        const Real* h_old = t ? a.out + (t - 1) * step : a.h0;
        const Real* c_old = t && pair ? a.cells + (t - 1) * step : a.c0;
        Real *h_new = a.out + t * step, *c_new = pair ? a.cells + t * step : nullptr, *next = a.state[(t + 1) % 2];
        const Real* state = in_blocks && !a.lanes ? h_old : a.state[t % 2];
        if (before) {
            pass(a.panels, a.blocks, part, t, 0, state, live,
                 [&](uint32_t b, uint32_t j, uint32_t left, const Real* sums, uint32_t apart, Real* tape) {
                     const Vec<Real> r = gate(load(sums)), z = gate(load(sums + apart));
                     put(tape, left, r);
                     put(tape + H, left, z);
                     const Vec<Real> h = get(h_old + b * size_t{H} + j, left);
                     if (in_blocks && !a.lanes)
                         put(a.scaled + b * size_t{H} + j, left, mul(r, h));
                     else
                         send(a.scaled, b, j, left, mul(r, h));
                 });
            m.wait(m.team);
            state = a.scaled;
        }
        pass(last, before ? a.blocks_n : a.blocks, last_part, t, before ? 2 : 0, state, live,
             [&](uint32_t b, uint32_t j, uint32_t left, const Real* sums, uint32_t apart, Real* tape) {
                 const size_t at = static_cast<size_t>(b) * H + j, now = t * step + at;
                 const Vec<Real> old = get(h_old + at, left);
                 Vec<Real> h;
                 if (pair) {
                     const Vec<Real> i = gate(load(sums)), f = gate(load(sums + apart));
                     const Vec<Real> g = bounded(load(sums + 2 * apart)), o = gate(load(sums + 3 * apart));
                     const Vec<Real> c = get(c_old + at, left), made = fma(i, g, mul(f, c));
                     put(tape, left, i);
                     put(tape + H, left, f);
                     put(tape + 2 * H, left, g);
                     put(tape + 3 * H, left, o);
                     put(c_new + at, left, zoned(made, c, a.mask_c, a.keep_c, now, left));
                     h = mul(o, bounded(made));
                 } else if (a.kind >= Gated::tanh) {
                     const Vec<Real> sum = load(sums);
                     h = a.kind == Gated::tanh ? bounded(sum) : keep(not_le(sum, zero), sum);
                     put(tape, left, h);
                 } else {
                     Vec<Real> z, n;
                     if (before) {
                         z = get(tape + H, left);
                         n = bounded(load(sums));
                     } else {
                         const Vec<Real> r = gate(load(sums)), k = load(sums + 2 * apart);
                         z = gate(load(sums + apart));
                         n = bounded(fma(r, k, get(tape + 2 * H, left)));
                         put(tape, left, r);
                         put(tape + H, left, z);
                         put(tape + 3 * H, left, k);
                     }
                     put(tape + 2 * H, left, n);
                     h = between<Real>(n, old, z);
                 }
                 h = zoned(h, old, a.mask_h, a.keep_h, now, left);
                 put(h_new + at, left, h);
                 send(next, b, j, left, h);
             });
        if (live < B)
            for (uint32_t panel = last_part.first; panel < last_part.last; ++panel)
                units(last, panel, [&](uint32_t, uint32_t j, uint32_t left) {
                    for (uint32_t b = live; b < B; ++b) {
                        const size_t at = static_cast<size_t>(b) * H + j;
                        put(h_new + at, left, get(h_old + at, left));
                        if (pair) put(c_new + at, left, get(c_old + at, left));
                    }
                });
        m.wait(m.team);
    }
}

template <class Real>
SF_SHORT Vec<Real> dot_of(const BlockWeight<Real>& w, uint32_t col, const Real* q, bool wild) {
    return dot_blocks(w, col, q, wild);
}

template <class Real>
static void gated_backward(const GatedBackwardArgs<Real>& a, const Member& m) {
    const uint32_t H = a.units, B = a.batch, parts = tape_of(a.kind), width = parts * H;
    const size_t step = static_cast<size_t>(B) * H;
    const bool before = a.kind == Gated::gru_before, pair = a.kind == Gated::lstm;
    const bool in_blocks = a.blocks.start != nullptr;
    const Panels<Real>& w = a.panels;
    const Part part(count_of_panels(H, w.vectors), m);
    Real* acc = a.room + m.number * a.room_of_sums;
    const Vec<Real> zero = set1(Real(0)), one = set1(Real(1));
    const auto some = [&](const Real* p, size_t at, uint32_t left) { return p ? get(p + at, left) : zero; };
    const uint32_t first_own = part.first * w.vectors * kLanes;
    const uint32_t last_own = part.last * w.vectors * kLanes < H ? part.last * w.vectors * kLanes : H;
    const size_t groups = count_of_groups(H), samples = pad(B);  // in lanes
    uint32_t* bounds = a.lanes ? a.bounds + m.number * groups * gates_of(a.kind) * 2 : nullptr;
    uint32_t* bounds_n = bounds + (a.lanes ? groups * 4 : 0);  // behind those of two gates
    if (a.lanes && first_own < last_own) {
        find_bounds(a.blocks, first_own, last_own, bounds);
        if (before) find_bounds(a.blocks_n, first_own, last_own, bounds_n);
    }
    const auto own = [&](const auto& f) {  // every vector of units of this member
        for (uint32_t j = part.first * w.vectors * kLanes; j < H && j < part.last * w.vectors * kLanes; j += kLanes)
            f(j, H - j);
    };
    /// out (batch, units) += the product of rows [first, first + depth) of weight_hh, transposed, with those of sent.
    const auto product = [&](const Real* sent, uint32_t first, uint32_t depth, uint32_t live, Real* out, uint32_t t) {
        if (a.lanes) {
            if (first_own >= last_own) return;
            every_turned_product(
                first ? a.blocks_n : a.blocks, first ? bounds_n : bounds, first_own, last_own,
                sent + (first ? 2 * groups * kLanes * samples : 0), live, acc,
                [&](uint32_t b) {
                    return __atomic_load_n(a.wild + static_cast<size_t>(t) * B + b, __ATOMIC_RELAXED) != 0;
                },
                [&](uint32_t b, uint32_t j, const Vec<Real>& x) {
                    Real* to = out + static_cast<size_t>(b) * H + j;
                    put(to, last_own - j, add(get(to, last_own - j), x));
                });
            return;
        }
        if (in_blocks) {
            const BlockWeight<Real>& blocks = first ? a.blocks_n : a.blocks;
            const size_t size = static_cast<size_t>(blocks.gates) * pad(H);
            const uint32_t end = part.last * w.vectors * kLanes < H ? part.last * w.vectors * kLanes : H;
            for (uint32_t b = 0; b < live; ++b) {
                const Real* q = sent + (first ? 2 * size * B : 0) + b * size;
                const bool wild = __atomic_load_n(a.wild + static_cast<size_t>(t) * B + b, __ATOMIC_RELAXED);
                const auto dot = [&](uint32_t c) { return dot_of(blocks, c, q, wild); };
                Real* to = out + static_cast<size_t>(b) * H;
                uint32_t c = part.first * w.vectors * kLanes;
                for (; c + 4 <= end; c += 4) add_sums(to + c, dot(c), dot(c + 1), dot(c + 2), dot(c + 3));
                for (; c < end; ++c) to[c] += sum(dot(c));
            }
            return;
        }
        each_panel(part, t % 2, [&](uint32_t panel, uint32_t next) {
            const auto each = [&](const auto& f) {
                for (uint32_t b = 0; b < live; ++b)
                    for (uint32_t v = 0; v < w.vectors; ++v) {
                        const uint32_t j = (panel * w.vectors + v) * kLanes;
                        f(acc + (b * w.vectors + v) * kLanes, out + static_cast<size_t>(b) * H + j, j, H - j);
                    }
            };
            each([&](Real* to, const Real* from, uint32_t j, uint32_t left) {
                store(to, j < H ? get(from, left) : zero);
            });
            add_panel_of(w, acc, panel, next, first, depth, sent + static_cast<size_t>(first) * B, B, live, part);
            each([&](const Real* from, Real* to, uint32_t j, uint32_t left) {
                if (j < H) put(to, left, load(from));
            });
        });
    };
    /// To where the product finds it: a vector of what a gate's rows of weight_hh are multiplied with.
    const auto send = [&](Real* sent, uint32_t gate, uint32_t b, uint32_t j, uint32_t left, const Vec<Real>& x) {
        if (!in_blocks) return spread_out(sent + (static_cast<size_t>(gate) * H + j) * B + b, B, left, x);
        const bool apart = before && gate == 2;
        const uint32_t gates = before ? (apart ? 1 : 2) : gates_of(a.kind);
        if (a.lanes) {
            const size_t row = static_cast<size_t>(j / kLanes) * gates + (apart ? 0 : gate);
            Real* to = sent + (apart ? 2 * groups * kLanes * samples : 0) + in_lanes(b, groups * gates, row);
            return spread_out(to, kLanes, left, x);
        }
        const size_t group = static_cast<size_t>(b) * count_of_groups(H) + j / kLanes;
        store(sent + (apart ? 2 * static_cast<size_t>(pad(H)) * B : 0) + (group * gates + (apart ? 0 : gate)) * kLanes,
              x);
    };
    const auto mark = [&](uint32_t t, uint32_t b, const Vec<Real>& x) {
        if (in_blocks && is_nan(mul(x, zero)))
            __atomic_store_n(a.wild + static_cast<size_t>(t) * B + b, uint8_t{1}, __ATOMIC_RELAXED);
    };
    if (!in_blocks) pack_columns(w, a.weight, part);
    own([&](uint32_t j, uint32_t left) {
        for (uint32_t b = 0; b < B; ++b) {
            const size_t at = static_cast<size_t>(b) * H + j;
            put(a.dh + at, left, some(a.grad_h_n, at, left));
            if (pair) put(a.dc + at, left, some(a.grad_c_n, at, left));
        }
        for (uint32_t gate = 0; gate < parts; ++gate) put(a.dbias + gate * H + j, left, zero);
    });
    for (uint32_t t = a.steps; t-- > 0;) {
        const uint32_t live = a.live ? static_cast<uint32_t>(a.live[t]) : B;
        const Real* h_old = t ? a.out + (t - 1) * step : a.h0;
        const Real* c_old = t && pair ? a.cells + (t - 1) * step : a.c0;
        Real* sent = a.sent[t % 2];
        own([&](uint32_t j, uint32_t left) {
            Vec<Real> sums[4] = {zero, zero, zero, zero};
            for (uint32_t b = 0; b < B; ++b) {
                const size_t at = static_cast<size_t>(b) * H + j, now = t * step + at;
                Real* out = a.gates + (static_cast<size_t>(t) * B + b) * width + j;
                const Vec<Real> dh = add(some(a.grad_out, now, left), get(a.dh + at, left));
                if (b >= live) {
                    put(a.dh + at, left, dh);
                    if (pair) put(a.dc + at, left, add(some(a.grad_cells, now, left), get(a.dc + at, left)));
                    for (uint32_t gate = 0; gate < parts; ++gate) put(out + gate * H, left, zero);
                    continue;
                }
                const Real* tape = a.tape + (static_cast<size_t>(t) * B + b) * width + j;
                Vec<Real> made = dh, kept = zero;
                if (a.mask_h || a.keep_h != 0) {
                    const Vec<Real> taken = fresh(a.mask_h, a.keep_h, now, left);
                    made = mul(taken, dh);
                    kept = mul(sub(one, taken), dh);
                }
                Vec<Real> g[4] = {zero, zero, zero, zero};
                if (pair) {
                    const Vec<Real> i = get(tape, left), f = get(tape + H, left);
                    const Vec<Real> n = get(tape + 2 * H, left), o = get(tape + 3 * H, left);
                    const Vec<Real> c = get(c_old + at, left), s = bounded(fma(i, n, mul(f, c)));
                    Vec<Real> dc = add(some(a.grad_cells, now, left), get(a.dc + at, left)), kept_c = zero;
                    if (a.mask_c || a.keep_c != 0) {
                        const Vec<Real> taken = fresh(a.mask_c, a.keep_c, now, left);
                        kept_c = mul(sub(one, taken), dc);
                        dc = mul(taken, dc);
                    }
                    dc = fma(mul(made, o), bounded_slope(s, one), dc);
                    put(a.dc + at, left, fma(dc, f, kept_c));
                    g[0] = mul(mul(dc, n), gate_slope(i, one));
                    g[1] = mul(mul(dc, c), gate_slope(f, one));
                    g[2] = mul(mul(dc, i), bounded_slope(n, one));
                    g[3] = mul(mul(made, s), gate_slope(o, one));
                } else if (a.kind >= Gated::tanh) {
                    const Vec<Real> n = get(tape, left);
                    g[0] = a.kind == Gated::tanh ? mul(made, bounded_slope(n, one)) : keep(not_le(n, zero), made);
                } else {
                    const Vec<Real> r = get(tape, left), z = get(tape + H, left);
                    const Vec<Real> n = get(tape + 2 * H, left), h = get(h_old + at, left);
                    kept = fma(z, made, kept);
                    g[1] = mul(mul(sub(h, n), made), gate_slope(z, one));
                    g[2] = mul(mul(sub(one, z), made), bounded_slope(n, one));
                    if (!before) {
                        g[0] = mul(mul(g[2], get(tape + 3 * H, left)), gate_slope(r, one));
                        g[3] = mul(r, g[2]);
                    } else {
                        put(a.back + at, left, zero);
                    }
                }
                put(a.dh + at, left, kept);
                for (uint32_t gate = before ? 1 : 0; gate < parts; ++gate) {
                    put(out + gate * H, left, g[gate]);
                    sums[gate] = add(sums[gate], g[gate]);
                    if (a.kind == Gated::gru && gate == 2) continue;
                    send(sent, a.kind == Gated::gru && gate == 3 ? 2 : gate, b, j, left, g[gate]);  // what r multiplies
                    mark(t, b, g[gate]);
                }
            }
            for (uint32_t gate = 0; gate < parts; ++gate)
                put(a.dbias + gate * H + j, left, add(get(a.dbias + gate * H + j, left), sums[gate]));
        });
        m.wait(m.team);
        if (before) {
            product(sent, 2 * H, H, live, a.back, t);  // of r * h
            own([&](uint32_t j, uint32_t left) {
                Vec<Real> sums = zero;
                for (uint32_t b = 0; b < live; ++b) {
                    const size_t at = static_cast<size_t>(b) * H + j, row = static_cast<size_t>(t) * B + b;
                    const Vec<Real> r = get(a.tape + row * width + j, left), back = get(a.back + at, left);
                    const Vec<Real> dr = mul(mul(back, get(h_old + at, left)), gate_slope(r, one));
                    put(a.gates + row * width + j, left, dr);
                    sums = add(sums, dr);
                    send(sent, 0, b, j, left, dr);
                    mark(t, b, dr);
                    put(a.dh + at, left, fma(r, back, get(a.dh + at, left)));
                }
                put(a.dbias + j, left, add(get(a.dbias + j, left), sums));
            });
            m.wait(m.team);
            product(sent, 0, 2 * H, live, a.dh, t);
        } else {
            product(sent, 0, gates_of(a.kind) * H, live, a.dh, t);
        }
    }
}

#ifndef SPARSEFOLD_GATED_DOUBLES  // double precision is for checks: once for all instruction sets
template <>
void gated_forward<double>(const GatedForwardArgs<double>& a, const Member& m) {
    sequences_generic.f64.gated_forward(a, m);
}
template <>
void gated_backward<double>(const GatedBackwardArgs<double>& a, const Member& m) {
    sequences_generic.f64.gated_backward(a, m);
}
template <>
void outer_blocks<double>(const OuterBlocksArgs<double>& a, const Member& m) {
    sequences_generic.f64.outer_blocks(a, m);
}
#endif

#define SPARSEFOLD_TABLE_(isa) sequences_##isa
#define SPARSEFOLD_TABLE(isa) SPARSEFOLD_TABLE_(isa)

}  // namespace SPARSEFOLD_ISA

const Sequences SPARSEFOLD_TABLE(SPARSEFOLD_ISA) = {
#define SPARSEFOLD_SEQUENCE(name, Args) SPARSEFOLD_ISA::name<float>,
    {
#include "sequences.def"
    },
#undef SPARSEFOLD_SEQUENCE
#define SPARSEFOLD_SEQUENCE(name, Args) SPARSEFOLD_ISA::name<double>,
    {
#include "sequences.def"
    }};
#undef SPARSEFOLD_SEQUENCE

}  // namespace sparsefold
