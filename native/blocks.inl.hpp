// Training: a weight by its live blocks, kLanes units of one gate against one input, and every product with it but the
// loop over time: by events, input after input; by all of x, many samples at a time.
#pragma once
#include "training.inl.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

template <class Real>
static void pack_blocks(const PackBlocksArgs<Real>& a, const Member& m) {
    const Strips part(a.units, a.strips, m);
    const uint32_t segments = count_of_segments(a.cols), H = a.units;
    uint32_t* cursor = a.cursor + static_cast<size_t>(m.number) * a.cols;
    const Vec<Real> zero = set1(Real(0));
    Vec<Real> wild = zero;
    bool changed = false;
    for (uint32_t strip = part.first; strip < part.last; ++strip) {
        const uint32_t tiles = count_of_tiles(H), end = share(tiles, strip + 1, a.strips) * (kTile / kLanes);
        const uint32_t groups = count_of_groups(H), last = end < groups ? end : groups;
        if (a.start)
            for (uint32_t c = 0; c < a.cols; ++c) cursor[c] = a.start[static_cast<size_t>(c) * a.strips + strip];
        for (uint32_t i = share(tiles, strip, a.strips) * (kTile / kLanes) * a.gates; i < last * a.gates; ++i) {
            const uint32_t unit = i / a.gates * kLanes, rows = H - unit < kLanes ? H - unit : kLanes;
            const Real* from = a.weight + (static_cast<size_t>(i % a.gates) * H + unit) * a.cols;
            Real* by_row = a.start ? a.by_row + static_cast<size_t>(a.row_start[i]) * kLanes : nullptr;
            for (uint32_t s = 0; s < segments; ++s) {
                const uint32_t col = s * kSegment, cols = a.cols - col < kSegment ? a.cols - col : kSegment;
                uint64_t bits = a.kept ? a.kept[static_cast<size_t>(i) * segments + s] : 0;
                for (uint32_t c = 0; c < cols; c += kLanes) {
                    uint32_t found = 0;
                    for (uint32_t r = 0; r < rows; ++r) {
                        const Vec<Real> x = load_some(from + static_cast<size_t>(r) * a.cols + col + c, cols - c);
                        found |= not_le(x, zero) | not_le(zero, x);
                        wild = fma(x, zero, wild);
                    }
                    bits |= static_cast<uint64_t>(found) << c;
                }
                uint64_t& live = a.live[static_cast<size_t>(i) * segments + s];
                changed |= bits != live;
                live = bits;
                if (!a.start || changed) continue;
                for (; bits; bits &= bits - 1) {
                    const uint32_t c = col + static_cast<uint32_t>(__builtin_ctzll(bits));
                    Real* to = a.values + static_cast<size_t>(cursor[c]++) * kLanes;
                    for (uint32_t r = 0; r < rows; ++r) to[r] = from[static_cast<size_t>(r) * a.cols + c];
                    for (uint32_t r = rows; r < kLanes; ++r) to[r] = 0;
                    store(by_row, load(to));
                    by_row += kLanes;
                }
            }
        }
    }
    a.changed[m.number] = changed;
    a.wild[m.number] = is_nan(wild) != 0;
}

/// f(row, block) of the live blocks of an input from `at` up to `end`, and f(row, null) of the missing ones of `rows`.
template <class Real, class F>
SF_INLINE void every_block(const BlockWeight<Real>& w, uint32_t at, uint32_t end, uint32_t row, uint32_t rows,
                           const F& f) {
    for (; row < rows; ++row) {
        const bool live = at < end && w.row[at] == row;
        f(row, live ? w.values + static_cast<size_t>(at) * kLanes : nullptr);
        at += live;
    }
}

/// sums += W x in the rows of one strip. x is a list of n values, of inputs `col` + index[k] (of col + k without one);
/// sums hold all of W's rows, group by group, gate by gate.
template <class Real>
SF_INLINE void add_blocks(Real* sums, const BlockWeight<Real>& w, uint32_t strip, uint32_t col, const uint32_t* index,
                          const Real* value, uint32_t n) {
    const uint32_t *start = w.start + strip, *row = w.row;
    const Real* values = w.values;
    for (uint32_t k = 0; k < n; ++k) {
        const size_t at = static_cast<size_t>(col + (index ? index[k] : k)) * w.strips;
        const uint32_t end = start[at + 1];
        const Vec<Real> x = set1(value[k]);
        if (value[k] * 0 == 0) {
            for (uint32_t i = start[at]; i < end; ++i) {
                Real* to = sums + static_cast<size_t>(row[i]) * kLanes;
                store(to, fma(load(values + static_cast<size_t>(i) * kLanes), x, load(to)));
            }
        } else {  // zeros that were not stored make no number of it either
            const uint32_t tiles = count_of_tiles(w.units), rows = kTile / kLanes * w.gates;
            const uint32_t last = share(tiles, strip + 1, w.strips) * rows, all = count_of_groups(w.units) * w.gates;
            every_block(w, start[at], end, share(tiles, strip, w.strips) * rows, last < all ? last : all,
                        [&](uint32_t r, const Real* block) {
                            Real* to = sums + static_cast<size_t>(r) * kLanes;
                            store(to, fma(block ? load(block) : set1(Real(0)), x, load(to)));
                        });
        }
    }
}

/// Vectors whose lanes' sum is input `col` of W^T q; q holds all of W's rows, as sums above. `wild`: q is not finite.
template <class Real>
SF_INLINE Vec<Real> dot_blocks(const BlockWeight<Real>& w, uint32_t col, const Real* q, bool wild) {
    const uint32_t at = w.start[static_cast<size_t>(col) * w.strips];
    const uint32_t end = w.start[static_cast<size_t>(col + 1) * w.strips];
    Vec<Real> total = set1(Real(0));
    if (wild) {
        every_block(w, at, end, 0, count_of_groups(w.units) * w.gates, [&](uint32_t r, const Real* block) {
            total = fma(block ? load(block) : set1(Real(0)), load(q + static_cast<size_t>(r) * kLanes), total);
        });
        return total;
    }
    for (uint32_t i = at; i < end; ++i)
        total = fma(load(w.values + static_cast<size_t>(i) * kLanes), load(q + static_cast<size_t>(w.row[i]) * kLanes),
                    total);
    return total;
}

template <class Real, class F>
SF_INLINE void each_part(const Sifted<Real>& x, uint32_t row, const F& f) {
    for (uint32_t p = 0; p < count_of_segments(x.cols); ++p) {
        const uint32_t* start = x.start + p * (static_cast<size_t>(x.rows) + 1) + row;
        if (start[1] != start[0]) f(p, p * x.stride + start[0], start[1] - start[0]);
    }
}

template <class Real>
static void input_product_of_events(const InputProductArgs<Real>& a, const Member& m) {
    const BlockWeight<Real>& w = a.blocks;
    const Strips part(w.units, w.strips, m);
    const uint32_t groups = count_of_groups(w.units), end = part.last_tile * (kTile / kLanes);
    const uint32_t first = part.first_tile * (kTile / kLanes) * w.gates, last = (end < groups ? end : groups) * w.gates;
    Real* sums = a.room + m.number * a.room_of_member;
    for (uint32_t r = 0; r < a.x.rows; ++r) {
        const auto each = [&](auto f) {
            for (uint32_t i = first; i < last; ++i) {
                const uint32_t unit = i / w.gates * kLanes;
                f(sums + static_cast<size_t>(i) * kLanes, i % w.gates * w.units + unit, w.units - unit);
            }
        };
        each([&](Real* to, uint32_t at, uint32_t left) { store(to, load_some(a.bias + at, left)); });
        for (uint32_t strip = part.first; strip < part.last; ++strip)
            each_part(a.x, r, [&](uint32_t p, size_t at, uint32_t n) {
                add_blocks(sums, w, strip, p * kSegment, a.x.lane + at, a.x.value + at, n);
            });
        each([&](Real* from, uint32_t at, uint32_t left) { store_some(a.out + r * a.stride + at, left, load(from)); });
    }
}

// Where all of x is read, sixteen samples (or steps of them) lie in the lanes. A row of W's blocks, kLanes units of one
// gate, then is the factor of every block of sums in registers: a line of x or of the sums for each block, and no sum
// across lanes. Rows come in order, whoever has which samples.

constexpr uint32_t kBlock = kLanes * kLanes;  // elements of a row's units, or inputs, with the samples in the lanes

/// Units, or inputs, whose sums stay in registers.
template <class Real>
constexpr uint32_t kSumsOf = BlockOf<Real>::sums < kSums ? 1 : kHiding;

/// sums (kLanes units, kLanes samples) += the blocks of `row` times x (inputs, kLanes samples).
template <class Real>
static __attribute__((noinline)) void add_row(Real* sums, const BlockWeight<Real>& w, uint32_t row, const Real* x) {
    constexpr uint32_t N = kSumsOf<Real>;
    for (uint32_t first = 0; first < kLanes; first += N, sums += N * kLanes) {
        Vec<Real> total[N];
#pragma GCC unroll 16
        for (uint32_t i = 0; i < N; ++i) total[i] = load(sums + i * kLanes);
        for (uint32_t k = w.row_start[row]; k < w.row_start[row + 1]; ++k) {
            const Vec<Real> v = load(x + static_cast<size_t>(w.col[k]) * kLanes);
            const Real* value = one_base(w.by_row + static_cast<size_t>(k) * kLanes + first);
#pragma GCC unroll 16
            for (uint32_t i = 0; i < N; ++i) total[i] = fma(v, set1(value[i]), total[i]);
        }
#pragma GCC unroll 16
        for (uint32_t i = 0; i < N; ++i) store(sums + i * kLanes, total[i]);
    }
}

/// sums (inputs from `col` on, kLanes samples) += the blocks [first, last) of a row, turned over, times q (kLanes
/// units, kLanes samples).
template <class Real>
static __attribute__((noinline)) void add_row_turned(Real* sums, uint32_t col, const BlockWeight<Real>& w,
                                                     uint32_t first, uint32_t last, const Real* q) {
    for (uint32_t at = first, count; at < last; at += count) {
        count = last - at < kSumsOf<Real> ? last - at : kSumsOf<Real>;
        with_number<kSumsOf<Real>>(count, [&](auto number) {
            constexpr uint32_t N = decltype(number)::value;
            Vec<Real> total[N];
            const Real* value = one_base(w.by_row + static_cast<size_t>(at) * kLanes);
#pragma GCC unroll 16
            for (uint32_t i = 0; i < N; ++i) total[i] = load(sums + static_cast<size_t>(w.col[at + i] - col) * kLanes);
#pragma GCC unroll 4
            for (uint32_t u = 0; u < kLanes; ++u) {
                const Vec<Real> v = load(q + u * kLanes);
#pragma GCC unroll 16
                for (uint32_t i = 0; i < N; ++i) total[i] = fma(v, set1(value[i * kLanes + u]), total[i]);
            }
#pragma GCC unroll 16
            for (uint32_t i = 0; i < N; ++i) store(sums + static_cast<size_t>(w.col[at + i] - col) * kLanes, total[i]);
        });
    }
}

/// The first of a row's blocks whose input is not before `col`.
template <class Real>
SF_INLINE uint32_t first_block(const BlockWeight<Real>& w, uint32_t row, uint32_t col) {
    uint32_t at = w.row_start[row];
    while (at < w.row_start[row + 1] && w.col[at] < col) ++at;
    return at;
}

/// f(input) of those of [first, last) that have no block in a row.
template <class Real, class F>
SF_INLINE void every_missing(const BlockWeight<Real>& w, uint32_t row, uint32_t first, uint32_t last, const F& f) {
    uint32_t at = first_block(w, row, first);
    const uint32_t end = w.row_start[row + 1];
    for (uint32_t c = first; c < last; ++c) {
        if (at < end && w.col[at] == c)
            ++at;
        else
            f(c);
    }
}

/// What zeros that were not stored bring where x, or q, is not finite.
template <class Real>
static void add_zeros(Real* sums, const BlockWeight<Real>& w, uint32_t row, const Real* x) {
    Vec<Real> none = set1(Real(0));
    every_missing(w, row, 0, w.cols,
                  [&](uint32_t c) { none = fma(load(x + static_cast<size_t>(c) * kLanes), set1(Real(0)), none); });
    for (uint32_t i = 0; i < kLanes; ++i) store(sums + i * kLanes, add(load(sums + i * kLanes), none));
}
template <class Real>
static void add_zeros_turned(Real* sums, const BlockWeight<Real>& w, uint32_t row, uint32_t first, uint32_t last,
                             const Real* q) {
    Vec<Real> none = set1(Real(0));
    for (uint32_t u = 0; u < kLanes; ++u) none = fma(load(q + u * kLanes), set1(Real(0)), none);
    if (!is_nan(none)) return;
    every_missing(w, row, first, last, [&](uint32_t c) {
        Real* to = sums + static_cast<size_t>(c - first) * kLanes;
        store(to, add(load(to), none));
    });
}

/// f(sample, input, vector of sums from that input on) of sums (inputs, kLanes samples), for n samples.
template <class Real, class F>
SF_INLINE void turn_back(const Real* sums, uint32_t inputs, uint32_t n, const F& f) {
    alignas(64) Real line[kBlock];
    for (uint32_t c = 0; c < inputs; c += kLanes) {
        turn(sums + static_cast<size_t>(c) * kLanes, kLanes, kLanes, n, line, kLanes);
        for (uint32_t s = 0; s < n; ++s) f(s, c, load(line + s * kLanes));
    }
}

/// f(each) for every kTogether of the tiles of kLanes rows from `first` up to `last`, which share the reading of a
/// weight; each(g) calls g(place among those tiles, first row, rows) for each of them.
template <class F>
SF_INLINE void every_tile(uint32_t first, uint32_t last, uint32_t rows, const F& f) {
    for (uint32_t tile = first; tile < last; tile += kTogether)
        f([&](const auto& g) {
            for (uint32_t k = 0; k < kTogether && tile + k < last; ++k) {
                const uint32_t row = (tile + k) * kLanes;
                g(k, row, rows - row < kLanes ? rows - row : kLanes);
            }
        });
}

/// f(sample, input, vector from that input on) of W^T q of the inputs [first, last), for `samples` samples of q
/// (samples / kLanes, groups, gates, kLanes units, kLanes samples). bound: where those inputs begin and end among each
/// row's blocks. wild(sample): q is not finite.
template <class Real, class Wild, class F>
SF_INLINE void every_turned_product(const BlockWeight<Real>& w, const uint32_t* bound, uint32_t first, uint32_t last,
                                    const Real* q, uint32_t samples, Real* sums, const Wild& wild, const F& f) {
    const uint32_t rows = count_of_groups(w.units) * w.gates;
    const size_t size = static_cast<size_t>(pad(w.cols)) * kLanes;
    every_tile(0, count_of_groups(samples), samples, [&](const auto& each) {
        bool zeros[kTogether] = {};
        each([&](uint32_t k, uint32_t sample, uint32_t n) {
            for (uint32_t s = 0; s < n; ++s) zeros[k] |= wild(sample + s);
            for (uint32_t c = 0; c < pad(last - first); ++c)
                store(sums + k * size + static_cast<size_t>(c) * kLanes, set1(Real(0)));
        });
        for (uint32_t i = 0; i < rows; ++i)
            each([&](uint32_t k, uint32_t sample, uint32_t) {
                const Real* from = q + (sample / kLanes * static_cast<size_t>(rows) + i) * kBlock;
                add_row_turned(sums + k * size, first, w, bound[2 * i], bound[2 * i + 1], from);
                if (zeros[k]) add_zeros_turned(sums + k * size, w, i, first, last, from);
            });
        each([&](uint32_t k, uint32_t sample, uint32_t n) {
            turn_back(sums + k * size, last - first, n,
                      [&](uint32_t s, uint32_t c, const Vec<Real>& x) { f(sample + s, first + c, x); });
        });
    });
}

/// Fills in where the inputs [first, last) begin and end among the blocks of each row.
template <class Real>
SF_INLINE void find_bounds(const BlockWeight<Real>& w, uint32_t first, uint32_t last, uint32_t* bound) {
    for (uint32_t i = 0; i < count_of_groups(w.units) * w.gates; ++i) {
        bound[2 * i] = first_block(w, i, first);
        bound[2 * i + 1] = first_block(w, i, last);
    }
}

/// Where the product finds a vector of units of one sample, and lane i's neighbour kLanes behind: row `row` of `rows`.
SF_INLINE size_t in_lanes(uint32_t sample, size_t rows, size_t row) {
    return (sample / kLanes * rows + row) * kBlock + sample % kLanes;
}

template <class Real>
static void input_product_of_rows(const InputProductArgs<Real>& a, const Member& m) {
    const BlockWeight<Real>& w = a.blocks;
    const size_t size = static_cast<size_t>(pad(w.cols)) * kLanes;
    Real* x = a.room + m.number * a.room_of_member;
    bool wild[kTogether] = {};
    alignas(64) Real sums[kBlock];
    const Part tiles(count_of_groups(a.x.rows), m);
    every_tile(tiles.first, tiles.last, a.x.rows, [&](const auto& each) {
        each([&](uint32_t k, uint32_t first, uint32_t n) {
            wild[k] = false;
            for (uint32_t c = 0; c < w.cols; c += kLanes)
                wild[k] |= turn(a.dense + static_cast<size_t>(first) * w.cols + c, w.cols, n,
                                w.cols - c < kLanes ? w.cols - c : kLanes, x + k * size + c * kLanes, kLanes) != 0;
        });
        for (uint32_t row = 0; row < count_of_groups(w.units) * w.gates; ++row) {
            const uint32_t unit = row / w.gates * kLanes, at = row % w.gates * w.units + unit;
            const uint32_t left = w.units - unit < kLanes ? w.units - unit : kLanes;
            each([&](uint32_t k, uint32_t first, uint32_t n) {
                for (uint32_t i = 0; i < kLanes; ++i)
                    store(sums + i * kLanes, set1(i < left ? a.bias[at + i] : Real(0)));
                add_row(sums, w, row, x + k * size);
                if (wild[k]) add_zeros(sums, w, row, x + k * size);
                turn_back(sums, kLanes, n, [&](uint32_t s, uint32_t, const Vec<Real>& y) {
                    store_some(a.out + (first + s) * a.stride + at, left, y);
                });
            });
        }
    });
}

template <class Real>
static void input_gradient(const InputGradientArgs<Real>& a, const Member& m) {
    const BlockWeight<Real>& w = a.blocks;
    const uint32_t rows = count_of_groups(w.units) * w.gates;
    const size_t size = static_cast<size_t>(pad(w.cols)) * kLanes;
    Real* sums = a.room + m.number * kTogether * size;
    alignas(64) Real q[kBlock];
    const auto at = [&](uint32_t row) { return row % w.gates * w.units + row / w.gates * kLanes; };
    const Part tiles(count_of_groups(a.rows), m);
    every_tile(tiles.first, tiles.last, a.rows, [&](const auto& each) {
        for (size_t i = 0; i < kTogether * size; i += kLanes) store(sums + i, set1(Real(0)));
        for (uint32_t row = 0; row < rows; ++row)
            each([&](uint32_t k, uint32_t first, uint32_t n) {
                const uint32_t unit = row / w.gates * kLanes, left = w.units - unit < kLanes ? w.units - unit : kLanes;
                const Real* g = a.g + first * a.stride;
                for (uint32_t s = 0; s < n && row + 1 < rows; ++s)
                    __builtin_prefetch(g + s * a.stride + at(row + 1), 0, 3);
                const uint32_t wild = turn(g + at(row), a.stride, n, left, q, kLanes);
                for (uint32_t u = left; u < kLanes; ++u) store(q + u * kLanes, set1(Real(0)));
                add_row_turned(sums + k * size, 0, w, w.row_start[row], w.row_start[row + 1], q);
                if (wild) add_zeros_turned(sums + k * size, w, row, 0, w.cols, q);
            });
        each([&](uint32_t k, uint32_t first, uint32_t n) {
            turn_back(sums + k * size, w.cols, n, [&](uint32_t s, uint32_t c, const Vec<Real>& x) {
                store_some(a.out + static_cast<size_t>(first + s) * w.cols + c, w.cols - c, x);
            });
        });
    });
}

/// sums (M, kLanes) += sum over r < n of g(r) * x(col[i], r), x of kTurned rows turned over.
template <uint32_t M, class Real>
static __attribute__((noinline)) void add_columns(Real* sums, const Real* g, const Real* x, const uint32_t* col,
                                                  uint32_t n) {
    Vec<Real> total[M];
    const Real* column[M];
#pragma GCC unroll 16
    for (uint32_t i = 0; i < M; ++i) {
        total[i] = load(sums + i * kLanes);
        column[i] = x + static_cast<size_t>(col[i]) * kTurned;
    }
    for (uint32_t r = 0; r < n; ++r) {
        const Vec<Real> now = load(g + r * kLanes);
#pragma GCC unroll 16
        for (uint32_t i = 0; i < M; ++i) total[i] = fma(now, set1(column[i][r]), total[i]);
    }
#pragma GCC unroll 16
    for (uint32_t i = 0; i < M; ++i) store(sums + i * kLanes, total[i]);
}

/// total += sum over the list of value * g(row).
template <class Real>
SF_INLINE void add_listed(Real* total, const Real* g, const uint16_t* row, const Real* value, uint32_t n) {
    Vec<Real> even = load(total), odd = set1(Real(0));  // two sums: one would wait for itself
    uint32_t k = 0;
    for (; k + 2 <= n; k += 2) {
        even = fma(load(g + row[k] * kLanes), set1(value[k]), even);
        odd = fma(load(g + row[k + 1] * kLanes), set1(value[k + 1]), odd);
    }
    if (k < n) even = fma(load(g + row[k] * kLanes), set1(value[k]), even);
    store(total, add(even, odd));
}

template <class Real>
static void outer_blocks(const OuterBlocksArgs<Real>& a, const Member& m) {
    constexpr uint32_t kMost = BlockOf<Real>::sums < 6 ? 1 : BlockOf<Real>::sums < 8 ? BlockOf<Real>::sums : 8;
    const uint32_t all = count_of_groups(a.units) * a.gates, cols = pad(a.cols);
    const auto begin = [&](uint32_t number) {  // the first row of the member of that number: all have as many blocks
        const uint32_t before = share(a.start[all], number, m.members);
        uint32_t low = 0, high = all;
        while (low < high) {
            const uint32_t middle = (low + high) / 2;
            if (a.start[middle] < before)
                low = middle + 1;
            else
                high = middle;
        }
        return low;
    };
    const uint32_t first_row = begin(m.number), last_row = m.number + 1 == m.members ? all : begin(m.number + 1);
    const Part columns(count_of_groups(a.cols), m);
    alignas(64) Real g[kTurned * kLanes];
    uint32_t odd = 0;
    for (uint32_t first = 0, n; first < a.rows; first += n, odd ^= 1) {
        const bool head = first < a.head_rows;
        const uint32_t end = head ? a.head_rows : a.rows;
        const Real* x = (head ? a.head : a.rest) + static_cast<size_t>(head ? first : first - a.head_rows) * a.cols;
        n = end - first < kTurned ? end - first : kTurned;
        Real* turned = a.room + odd * static_cast<size_t>(cols) * kTurned;
        uint16_t* row = a.row + odd * static_cast<size_t>(cols) * kTurned;
        uint16_t* count = a.count + odd * cols;
        for (uint32_t c = columns.first * kLanes; c < a.cols && c < columns.last * kLanes; c += kLanes) {
            const uint32_t left = a.cols - c < kLanes ? a.cols - c : kLanes;
            if (!a.row) {
                for (uint32_t r = 0; r < n; r += kLanes)
                    turn(x + static_cast<size_t>(r) * a.cols + c, a.cols, n - r < kLanes ? n - r : kLanes, left,
                         turned + static_cast<size_t>(c) * kTurned + r, kTurned);
                continue;
            }
            for (uint32_t i = 0; i < kLanes; ++i) count[c + i] = 0;
            for (uint32_t r = 0; r < n; ++r) {
                const Real* from = x + static_cast<size_t>(r) * a.cols + c;
                uint32_t bits = a.wild && a.wild[first + r] ? 0xffff : not_zero<Real>(load_some(from, left));
                for (bits &= first_lanes(left); bits; bits &= bits - 1) {
                    const uint32_t i = static_cast<uint32_t>(__builtin_ctz(bits));
                    const size_t to = static_cast<size_t>(c + i) * kTurned + count[c + i]++;
                    row[to] = static_cast<uint16_t>(r);
                    turned[to] = from[i];
                }
            }
        }
        m.wait(m.team);  // nobody is still at what lay here two chunks before: all came here after it
        for (uint32_t i = first_row; i < last_row; ++i) {
            const uint32_t unit = i / a.gates * kLanes;
            const Real* from = a.g + first * a.stride + a.part[i % a.gates] + unit;
            if (a.start[i] == a.start[i + 1]) continue;
            for (uint32_t r = 0; r < n; ++r) {
                __builtin_prefetch(from + r * a.stride + kLanes, 0, 2);  // of the gate's next units
                store(g + r * kLanes, load_some(from + r * a.stride, a.units - unit));
            }
            if (a.row) {
                for (uint32_t at = a.start[i]; at < a.start[i + 1]; ++at) {
                    const size_t list = static_cast<size_t>(a.col[at]) * kTurned;
                    add_listed(a.sums + static_cast<size_t>(at) * kLanes, g, row + list, turned + list,
                               count[a.col[at]]);
                }
                continue;
            }
            for (uint32_t at = a.start[i], together; at < a.start[i + 1]; at += together) {
                together = a.start[i + 1] - at < kMost ? a.start[i + 1] - at : kMost;
                for (uint32_t k = at + together; k < at + together + kMost && k < a.start[all]; ++k)
                    for (uint32_t r = 0; r < n; r += 64 / sizeof(Real))
                        __builtin_prefetch(turned + static_cast<size_t>(a.col[k]) * kTurned + r, 0, 3);
                with_number<kMost>(together, [&](auto number) {
                    add_columns<decltype(number)::value>(a.sums + static_cast<size_t>(at) * kLanes, g, turned,
                                                         a.col + at, n);
                });
            }
        }
    }
    for (uint32_t i = first_row; i < last_row; ++i) {
        const uint32_t unit = i / a.gates * kLanes, rows = a.units - unit < kLanes ? a.units - unit : kLanes;
        Real* to = a.out + (static_cast<size_t>(i % a.gates) * a.units + unit) * a.cols;
        for (uint32_t r = 0; r < rows; ++r)
            for (uint32_t at = a.start[i]; at < a.start[i + 1]; ++at)
                to[static_cast<size_t>(r) * a.cols + a.col[at]] = a.sums[static_cast<size_t>(at) * kLanes + r];
    }
}

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
