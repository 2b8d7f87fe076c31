// y += W x for every format, for dense x and for event lists, written once: the two differ only in which column the
// k-th term reads. What a product must move: for each column visited its stored values once, y once in and once out.
#pragma once
#include "simd.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

struct AllColumns {
    const float* x;
    uint32_t count;
    SF_INLINE uint32_t column(uint32_t k) const { return k; }
    SF_INLINE float value(uint32_t k) const { return x[k]; }
};

struct EventColumns {
    const Events& x;
    uint32_t count;
    SF_INLINE uint32_t column(uint32_t k) const { return x.index[k]; }
    SF_INLINE float value(uint32_t k) const { return x.value[k]; }
};

/// `Groups` vectors of rows at `w`, columns `stride` floats apart, the sums in registers over all columns. Narrow
/// strips keep `Chains` independent sums per vector, so that the latency of the multiply-add is hidden.
template <uint32_t Groups, uint32_t Chains, class Value, class Columns>
SF_INLINE void strip(const Value* w, uint32_t stride, const Columns& x, float* y) {
    F16 sum[Chains][Groups];
    for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = load(y + g * kLanes);
    for (uint32_t c = 1; c < Chains; ++c)
        for (uint32_t g = 0; g < Groups; ++g) sum[c][g] = set1(0.0f);
    uint32_t k = 0;
    for (; k + Chains <= x.count; k += Chains)
        for (uint32_t c = 0; c < Chains; ++c) {
            const Value* column = w + static_cast<size_t>(x.column(k + c)) * stride;
            const F16 value = set1(x.value(k + c));
            for (uint32_t g = 0; g < Groups; ++g) sum[c][g] = fma(load(column + g * kLanes), value, sum[c][g]);
        }
#pragma GCC unroll 1
    for (; k < x.count; ++k) {  // fewer than Chains
        const Value* column = w + static_cast<size_t>(x.column(k)) * stride;
        const F16 value = set1(x.value(k));
        for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = fma(load(column + g * kLanes), value, sum[0][g]);
    }
    for (uint32_t c = 1; c < Chains; ++c)
        for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = add(sum[0][g], sum[c][g]);
    for (uint32_t g = 0; g < Groups; ++g) store(y + g * kLanes, sum[0][g]);
}

template <uint32_t Groups, class Value, class Columns>
SF_INLINE void strips(uint32_t groups, const Value* w, uint32_t stride, const Columns& x, float* y) {
    if constexpr (Groups > 0) {
        if (groups == Groups) return strip<Groups, (kHiding + Groups - 1) / Groups>(w, stride, x, y);
        strips<Groups - 1>(groups, w, stride, x, y);
    }
}

template <class Value, class Columns>
SF_INLINE void matvec(const Dense<Value>& w, const Columns& x, float* y) {
    for (uint32_t row = 0; row < w.rows; row += kPanel) {
        const uint32_t width = w.rows - row < kPanel ? w.rows - row : kPanel;
        const Value* panel = w.values + static_cast<size_t>(row) * w.cols;
        const uint32_t groups = width / kLanes, passes = (groups + kAccumulators - 1) / kAccumulators;
        for (uint32_t pass = 0; pass < passes; ++pass) {
            const uint32_t first = groups * pass / passes, last = groups * (pass + 1) / passes;
            strips<kAccumulators>(last - first, panel + first * kLanes, width, x, y + row + first * kLanes);
        }
    }
}

/// Four segments of whole vectors, whose rows differ: every sum is under way before the first is stored.
template <class Value, class Row>
SF_INLINE void axpy4(float* y, const Row* row, const Value* w, const F16& x) {
    const Row at[4] = {row[0], row[1], row[2], row[3]};
    F16 sum[4];
    for (uint32_t i = 0; i < 4; ++i) sum[i] = fma(load(w + i * kLanes), x, load(y + at[i]));
    for (uint32_t i = 0; i < 4; ++i) store(y + at[i], sum[i]);
}

/// Segments of whole vectors. Where each column ends is not to be guessed, and a loop over its segments would be
/// mispredicted at every end: the segments of many columns are written down first, by fours and what is left of each
/// column apart, and then what is read is known long before it is needed.
template <class Value, class Row, class Columns>
SF_INLINE void whole_segments(const Block<Value>& w, const Row* row, const Columns& x, float* y) {
    constexpr uint32_t kRoom = 512, kAhead = 8;
    const Value* const values = w.values;
    const uint32_t* const start = w.start;
    const auto segment = [values](uint32_t s) { return values + static_cast<size_t>(s) * kLanes; };
    uint32_t fours[kRoom + kLanes], ones[kRoom + kLanes];
    float x_fours[kRoom + kLanes], x_ones[kRoom + kLanes];
    for (uint32_t k = 0; k < x.count;) {
        uint32_t n = 0, left = 0;
        for (; k < x.count && n + kLanes <= kRoom && left + kLanes <= kRoom; ++k) {
            const uint32_t column = x.column(k), last = start[column + 1];
            uint32_t s = start[column];
            const F16 value = set1(x.value(k));
            if (last - s >= 4 * kLanes)  // long enough for a loop of its own
                for (; s + 4 <= last; s += 4) axpy4(y, row + s, segment(s), value);
            const uint32_t count = (last - s) / 4;
            ramp(fours + n, s, 4);
            store(x_fours + n, value);
            ramp(ones + left, s + 4 * count, 1);
            store(x_ones + left, value);
            n += count;
            left += (last - s) % 4;
        }
        ramp(fours + n, 0, 0);  // what is asked for behind the last
        for (uint32_t i = 0; i < n; ++i) {
            const char* const ahead = reinterpret_cast<const char*>(segment(fours[i + kAhead]));
            for (uint32_t line = 0; line < sizeof(Value); ++line) __builtin_prefetch(ahead + 64 * line);
            axpy4(y, row + fours[i], segment(fours[i]), set1(x_fours[i]));
        }
        for (uint32_t i = 0; i < left; ++i) axpy<kLanes>(y + row[ones[i]], segment(ones[i]), x_ones[i]);
    }
}

/// Height 0: any height, `length` rows of each segment exist.
template <uint32_t Height, class Value, class Row, class Columns>
SF_INLINE void segments(const Block<Value>& w, const Row* row, const Columns& x, float* y) {
    for (uint32_t k = 0; k < x.count; ++k) {
        const uint32_t column = x.column(k);
        const uint32_t first = w.start[column], last = w.start[column + 1];
        const float value = x.value(k);
        if constexpr (Height == 1) {
            add_at(y, row + first, w.values + first, value, last - first);
        } else if constexpr (Height != 0) {
            const Value* values = w.values + static_cast<size_t>(first) * Height;
            uint32_t s = first;
            if constexpr (Height == kLanes)
                for (; s + 4 <= last; s += 4, values += 4 * Height) axpy4(y, row + s, values, set1(value));
            for (; s < last; ++s, values += Height) axpy<Height>(y + row[s], values, value);
        } else {
            const Value* values = w.values + static_cast<size_t>(first) * w.height;
            for (uint32_t s = first; s < last; ++s, values += w.height)
                for (uint32_t i = 0; i < w.length[s]; ++i) y[row[s] + i] += widen(values[i]) * value;
        }
    }
}

template <class Value, class Row, class Columns>
SF_INLINE void by_height(const Block<Value>& w, const Row* row, const Columns& x, float* y) {
    switch (w.height) {
        case 16:
            if constexpr (sizeof(Value) < sizeof(float)) return whole_segments(w, row, x, y);
            return segments<16>(w, row, x, y);  // four lines each, which the processor fetches ahead by itself
        case 8:
            return segments<8>(w, row, x, y);
        case 4:
            return segments<4>(w, row, x, y);
        case 1:
            return segments<1>(w, row, x, y);
        default:
            return segments<0>(w, row, x, y);
    }
}

template <class Value, class Columns>
SF_INLINE void matvec(const Block<Value>& w, const Columns& x, float* y) {
    if (w.row16)
        by_height(w, w.row16, x, y);
    else
        by_height(w, w.row32, x, y);
}

/// y += W x with the sums of a strip in registers over all its columns: what is read is the stored weights, in order.
template <uint32_t Height, class Value, class Column>
SF_INLINE void strips_of_rows(const Rows<Value>& w, const Column* column, const float* x, float* y) {
    constexpr uint32_t kColumns = kLanes / Height, kChains = 4;
    for (uint32_t p = 0; p < w.strips; ++p, y += Height) {
        uint32_t v = w.start[p];
        const uint32_t last = w.start[p + 1];
        if (v == last) continue;
        F16 sums[kChains];
        for (uint32_t c = 0; c < kChains; ++c) sums[c] = set1(0.0f);
        const Value* values = w.values + static_cast<size_t>(v) * kLanes;
        const Column* at = column + static_cast<size_t>(v) * kColumns;
        for (; v + kChains < last; v += kChains, values += kChains * kLanes, at += kChains * kColumns)
            for (uint32_t c = 0; c < kChains; ++c)
                sums[c] = fma(load(values + c * kLanes), spread<Height>(x, at + c * kColumns), sums[c]);
        for (; v + 1 < last; ++v, values += kLanes, at += kColumns)
            sums[1] = fma(load(values), spread<Height>(x, at), sums[1]);
        const F16 rest = mul(load(values), spread<Height>(x, at));
        sums[0] = Height == kLanes ? add(sums[0], rest) : add_where(sums[0], w.tail[p], rest);
        const F16 total = add(add(sums[0], sums[1]), add(sums[2], sums[3]));
        if constexpr (Height == kLanes) {
            const F16 scale = w.scale ? load(w.scale + p * kLanes) : set1(1.0f);
            store(y, fma(total, scale, load(y)));
        } else {
            float lanes[kLanes];
            store(lanes, total);
            for (uint32_t half = kLanes / 2; half >= Height; half /= 2)
                for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
            for (uint32_t i = 0; i < Height; ++i) y[i] += lanes[i] * (w.scale ? w.scale[p * Height + i] : 1.0f);
        }
    }
}

template <class Value, class Column>
SF_INLINE void by_height(const Rows<Value>& w, const Column* column, const float* x, float* y) {
    switch (w.height) {
        case 16:
            return strips_of_rows<16>(w, column, x, y);
        case 8:
            return strips_of_rows<8>(w, column, x, y);
        case 4:
            return strips_of_rows<4>(w, column, x, y);
        case 2:
            return strips_of_rows<2>(w, column, x, y);
        default:
            return strips_of_rows<1>(w, column, x, y);
    }
}

template <class Value>
SF_INLINE void matvec(const Rows<Value>& w, const AllColumns& x, float* y) {
    if (w.column16)
        by_height(w, w.column16, x.x, y);
    else
        by_height(w, w.column32, x.x, y);
}

/// Sums of products of codes are exact; one multiplication by both scales ends them.
template <uint32_t Height, class Column>
SF_INLINE void strips_of_codes(const RowsOfCodes& w, const Column* column, const int8_t* x, float x_scale, float* y) {
    constexpr uint32_t kColumns = 4 * kLanes / Height;
    constexpr uint32_t kVectors = Height == kLanes ? 4 : Height == 8 ? 2 : 1;  // that share one gathering of x
    static_assert(kVectors * kColumns % kCodeColumns == 0, "strips are packed in wholes of kCodeColumns");
    for (uint32_t p = 0; p < w.strips; ++p, y += Height) {
        const uint32_t first = w.start[p], last = w.start[p + 1];
        if (first == last) continue;
        const int8_t* values = w.values + static_cast<size_t>(first) * 4 * kLanes;
        const Column* at = column + static_cast<size_t>(first) * kColumns;
        I16 sums = zero();
        for (uint32_t v = first; v < last; v += kVectors, at += kVectors * kColumns) {
            const auto codes = gather_codes<kVectors * kColumns>(x, at);
            for (uint32_t k = 0; k < kVectors; ++k, values += 4 * kLanes)
                sums = dot4(sums, values, pick<Height>(codes, k));
        }
        int32_t lanes[kLanes];
        store(lanes, sums);
        for (uint32_t half = kLanes / 2; half >= Height; half /= 2)
            for (uint32_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
        for (uint32_t i = 0; i < Height; ++i)
            y[i] += static_cast<float>(lanes[i]) * (w.scale[p * Height + i] * x_scale);
    }
}

/// `Strips` strips of sixteen rows that hold all columns, from strip p on: they share what is read of x.
template <uint32_t Strips>
SF_INLINE void whole_strips_of_codes(const RowsOfCodes& w, uint32_t p, const int8_t* x, float x_scale, float* y) {
    const uint32_t vectors = w.start[p + 1] - w.start[p];
    const int8_t* const values = w.values + static_cast<size_t>(w.start[p]) * 4 * kLanes;
    const size_t strip = static_cast<size_t>(vectors) * 4 * kLanes;
    I16 sums[Strips];
    for (uint32_t i = 0; i < Strips; ++i) sums[i] = zero();
    for (uint32_t v = 0; v < vectors; ++v) {
        const I16 four = four_codes(x + static_cast<size_t>(v) * 4);
        for (uint32_t i = 0; i < Strips; ++i)
            sums[i] = dot4(sums[i], values + i * strip + static_cast<size_t>(v) * 4 * kLanes, four);
    }
    for (uint32_t i = 0; i < Strips; ++i, y += kLanes)
        store(y, fma(widen(sums[i]), mul(load(w.scale + (p + i) * kLanes), set1(x_scale)), load(y)));
}

SF_INLINE void whole_strips_of_codes(const RowsOfCodes& w, const int8_t* x, float x_scale, float* y) {
    constexpr uint32_t kStrips = 4;               // their sums fit the registers and hide the latency
    if (w.start[0] == w.start[w.strips]) return;  // blocks of any height, of which there are none
    uint32_t p = 0;
    for (; p + kStrips <= w.strips; p += kStrips, y += kStrips * kLanes)
        whole_strips_of_codes<kStrips>(w, p, x, x_scale, y);
    switch (w.strips - p) {
        case 3:
            return whole_strips_of_codes<3>(w, p, x, x_scale, y);
        case 2:
            return whole_strips_of_codes<2>(w, p, x, x_scale, y);
        case 1:
            return whole_strips_of_codes<1>(w, p, x, x_scale, y);
    }
}

/// The same of strips of sixteen rows whose columns are marked: what a strip reads of x is picked together while the
/// strip before is multiplied. Codes raised by 128 are unsigned, as the instruction wants them.
SF_INLINE void marked_strips_of_codes(const RowsOfCodes& w, const int8_t* x, float x_scale, float* y) {
    constexpr uint32_t kChains = 4;
    static_assert(kCodeColumns == 4 * kChains, "a strip holds whole rounds of all sums");
    uint8_t picked[2][kMarkedColumns + 64];
    const auto pick = [&](uint32_t p) {
        uint8_t* to = picked[p % 2];
        const uint64_t* const marks = w.marks + static_cast<size_t>(p) * w.words;
        for (uint32_t k = 0; k < w.words; ++k) to += pick_codes(to, x + 64 * k, marks[k]);
    };
    if (w.strips) pick(0);
    for (uint32_t p = 0; p < w.strips; ++p, y += kLanes) {
        if (p + 1 < w.strips) pick(p + 1);
        const int8_t* values = w.values + static_cast<size_t>(w.start[p]) * 4 * kLanes;
        const uint8_t* codes = picked[p % 2];
        I16 sums[kChains] = {zero(), zero(), zero(), zero()};
        for (uint32_t v = w.start[p]; v < w.start[p + 1]; v += kChains)
            for (uint32_t c = 0; c < kChains; ++c, values += 4 * kLanes, codes += 4) {
                sums[c] = dot4_raised(sums[c], values, codes);
            }
        const F16 sum = lowered(sums[0], sums[1], sums[2], sums[3], w.added + p * kLanes);
        store(y, fma(sum, mul(load(w.scale + p * kLanes), set1(x_scale)), load(y)));
    }
}

template <class Column>
SF_INLINE void by_height(const RowsOfCodes& w, const Column* column, const int8_t* x, float x_scale, float* y) {
    switch (w.height) {
        case 16:
            return strips_of_codes<16>(w, column, x, x_scale, y);
        case 8:
            return strips_of_codes<8>(w, column, x, x_scale, y);
        case 4:
            return strips_of_codes<4>(w, column, x, x_scale, y);
        case 2:
            return strips_of_codes<2>(w, column, x, x_scale, y);
        default:
            return strips_of_codes<1>(w, column, x, x_scale, y);
    }
}

static void matvec_rows_w8a8(const RowsOfCodes& w, const int8_t* x, float x_scale, float* y) {
    if (kPicksCodes && w.marks)
        marked_strips_of_codes(w, x, x_scale, y);
    else if (w.column16)
        by_height(w, w.column16, x, x_scale, y);
    else if (w.column32)
        by_height(w, w.column32, x, x_scale, y);
    else
        whole_strips_of_codes(w, x, x_scale, y);
}

/// The scale is the largest value / 127, so that nothing is clipped and no calibration is needed.
static float codes_of(const float* x, int8_t* codes, uint32_t n) {
    const F16 finite = set1(3.40282347e38f);
    F16 largest = set1(0.0f);
    uint32_t bad = 0, i = 0;
    for (; i < n; i += kLanes) {
        const F16 v = n - i < kLanes ? load_first(x + i, n - i) : load(x + i);
        const F16 size = max(v, sub(set1(0.0f), v));
        bad |= not_le(size, finite);
        largest = max(largest, size);
    }
    float lanes[kLanes], top = 0;
    store(lanes, largest);
    for (const float lane : lanes) top = lane > top ? lane : top;
    const bool tiny = bad || !(top > 1e-30f);  // 127 / top must stay finite
    const F16 inverse = set1(tiny ? 0.0f : 127.0f / top);
    for (i = 0; i < n; i += kLanes) {
        const uint32_t some = n - i < kLanes ? n - i : kLanes;
        if (tiny)
            for (uint32_t k = 0; k < some; ++k) codes[i + k] = 0;
        else
            store_codes(codes + i, some, round(mul(some < kLanes ? load_first(x + i, some) : load(x + i), inverse)));
    }
    for (uint32_t k = 0; k < 64; ++k) codes[n + k] = 0;  // what is read beyond the last column
    return bad ? __builtin_nanf("") : tiny ? 0.0f : top / 127.0f;
}

/// One tile of sets against `Groups` groups from `first` on, whose sums stay in registers over all columns: a set's
/// value goes to the one group that lives. `rows(q)` says where group q begins and how many of its lanes exist.
template <uint32_t Groups, class Value, class Columns, class RowsOf>
SF_INLINE void tile(const Value* values, const uint8_t* live, uint32_t first, const Columns& x, const RowsOf& rows,
                    float* y) {
    F16 sum[Groups];
    for (uint32_t q = 0; q < Groups; ++q) sum[q] = set1(0.0f);
    for (uint32_t k = 0; k < x.count; ++k) {
        const size_t at = static_cast<size_t>(x.column(k)) * kLanes;
        const F16 product = mul(load(values + at), set1(x.value(k)));
        for (uint32_t q = 0; q < Groups; ++q)
            sum[q] = add_where(sum[q], equal(live + at, static_cast<uint8_t>(first + q)), product);
    }
    for (uint32_t q = 0; q < Groups; ++q) {
        uint32_t row, lanes;
        rows(first + q, row, lanes);
        if (lanes) store_first(y + row, lanes, add(load_first(y + row, lanes), sum[q]));
    }
}

template <uint32_t Groups, class Value, class Columns, class RowsOf>
SF_INLINE void tiles(uint32_t groups, const Value* values, const uint8_t* live, uint32_t first, const Columns& x,
                     const RowsOf& rows, float* y) {
    if constexpr (Groups > 0) {
        if (groups == Groups) return tile<Groups>(values, live, first, x, rows, y);
        tiles<Groups - 1>(groups, values, live, first, x, rows, y);
    }
}

template <class Value, class Columns>
SF_INLINE void matvec(const Complementary<Value>& w, const Columns& x, float* y) {
    const Value* values = w.values;
    const uint8_t* live = w.live;
    for (uint32_t gate = 0; gate < w.gates; ++gate, y += pad(w.units))
        for (uint32_t set = 0; set < w.sets; set += kLanes) {
            const uint32_t lanes = w.sets - set < kLanes ? w.sets - set : kLanes;
            const auto rows = [&](uint32_t q, uint32_t& row, uint32_t& n) {
                row = q * w.sets + set;
                n = row >= w.units ? 0 : w.units - row < lanes ? w.units - row : lanes;
            };
            for (uint32_t q = 0; q < w.overlay; q += kTileGroups) {
                const uint32_t left = w.overlay - q;
                tiles<kTileGroups>(left < kTileGroups ? left : kTileGroups, values, live, q, x, rows, y);
            }
            values += static_cast<size_t>(w.cols) * kLanes;
            live += static_cast<size_t>(w.cols) * kLanes;
        }
}

/// y = y * s + b, or y * s where there is no b; `n` a multiple of kLanes.
static void scale(float* y, const float* s, const float* b, uint32_t n) {
    if (b)
        for (uint32_t i = 0; i < n; i += kLanes) store(y + i, fma(load(y + i), load(s + i), load(b + i)));
    else
        for (uint32_t i = 0; i < n; i += kLanes) store(y + i, mul(load(y + i), load(s + i)));
}

/// y += x * s, or y += x where there is no s; `n` a multiple of kLanes.
static void add_scaled(float* y, const float* x, const float* s, uint32_t n) {
    if (s)
        for (uint32_t i = 0; i < n; i += kLanes) store(y + i, fma(load(x + i), load(s + i), load(y + i)));
    else
        for (uint32_t i = 0; i < n; i += kLanes) store(y + i, add(load(x + i), load(y + i)));
}

#define SPARSEFOLD_MATVEC(format, dtype, Packed)                                               \
    static void matvec_##format##_##dtype(const Packed& w, const float* x, float* y) {         \
        matvec(w, AllColumns{x, w.cols}, y);                                                   \
    }                                                                                          \
    static void matvec_events_##format##_##dtype(const Packed& w, const Events& x, float* y) { \
        matvec(w, EventColumns{x, x.count}, y);                                                \
    }
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed) \
    static void matvec_##format##_##dtype(const Packed& w, const float* x, float* y) { matvec(w, AllColumns{x, 0}, y); }
#define SPARSEFOLD_MATVEC_CODES(format, Packed)
#define SPARSEFOLD_CELL(name, Args)
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
