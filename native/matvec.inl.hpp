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
template <uint32_t Groups, uint32_t Chains, class Columns>
SF_INLINE void strip(const float* w, uint32_t stride, const Columns& x, float* y) {
    F16 sum[Chains][Groups];
    for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = load(y + g * kLanes);
    for (uint32_t c = 1; c < Chains; ++c)
        for (uint32_t g = 0; g < Groups; ++g) sum[c][g] = set1(0.0f);
    uint32_t k = 0;
    for (; k + Chains <= x.count; k += Chains)
        for (uint32_t c = 0; c < Chains; ++c) {
            const float* column = w + static_cast<size_t>(x.column(k + c)) * stride;
            const F16 value = set1(x.value(k + c));
            for (uint32_t g = 0; g < Groups; ++g) sum[c][g] = fma(load(column + g * kLanes), value, sum[c][g]);
        }
    for (; k < x.count; ++k) {
        const float* column = w + static_cast<size_t>(x.column(k)) * stride;
        const F16 value = set1(x.value(k));
        for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = fma(load(column + g * kLanes), value, sum[0][g]);
    }
    for (uint32_t c = 1; c < Chains; ++c)
        for (uint32_t g = 0; g < Groups; ++g) sum[0][g] = add(sum[0][g], sum[c][g]);
    for (uint32_t g = 0; g < Groups; ++g) store(y + g * kLanes, sum[0][g]);
}

template <uint32_t Groups, class Columns>
SF_INLINE void strips(uint32_t groups, const float* w, uint32_t stride, const Columns& x, float* y) {
    if constexpr (Groups > 0) {
        if (groups == Groups) return strip<Groups, (kAccumulators + Groups - 1) / Groups>(w, stride, x, y);
        strips<Groups - 1>(groups, w, stride, x, y);
    }
}

template <class Columns>
SF_INLINE void matvec(const DenseF32& w, const Columns& x, float* y) {
    for (uint32_t row = 0; row < w.rows; row += kPanel) {
        const uint32_t width = w.rows - row < kPanel ? w.rows - row : kPanel;
        const float* panel = w.values + static_cast<size_t>(row) * w.cols;
        for (uint32_t g = 0; g < width; g += kAccumulators * kLanes) {
            const uint32_t left = (width - g) / kLanes;
            strips<kAccumulators>(left < kAccumulators ? left : kAccumulators, panel + g, width, x, y + row + g);
        }
    }
}

template <class Columns>
SF_INLINE void matvec(const BlockF32& w, const Columns& x, float* y) {
    for (uint32_t k = 0; k < x.count; ++k) {
        const uint32_t column = x.column(k);
        const uint32_t first = w.start[column], last = w.start[column + 1];
        const float* values = w.values + static_cast<size_t>(first) * w.height;
        if (!w.length) {
            const F16 value = set1(x.value(k));
            for (uint32_t s = first; s < last; ++s, values += kLanes) {
                float* rows = y + w.row[s];
                store(rows, fma(load(values), value, load(rows)));
            }
        } else {
            const float value = x.value(k);
            for (uint32_t s = first; s < last; ++s, values += w.height) {
                float* rows = y + w.row[s];
                for (uint32_t i = 0; i < w.length[s]; ++i) rows[i] += values[i] * value;
            }
        }
    }
}

#define SPARSEFOLD_MATVEC(format, dtype, Packed)                                               \
    static void matvec_##format##_##dtype(const Packed& w, const float* x, float* y) {         \
        matvec(w, AllColumns{x, w.cols}, y);                                                   \
    }                                                                                          \
    static void matvec_events_##format##_##dtype(const Packed& w, const Events& x, float* y) { \
        matvec(w, EventColumns{x, x.count}, y);                                                \
    }
#define SPARSEFOLD_CELL(name, Args)
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_CELL

}  // namespace SPARSEFOLD_ISA
}  // namespace sparsefold
