// Pointwise gate arithmetic of one step, sixteen units at a time (docs/equations.md; z keeps the old state):
//   GRU, EGRU  r = sigmoid(gi_r + gh_r)   z alike   n = tanh(gi_n + r * gh_n)   u = (1 - z) n + z h
//   LSTM       i = sigmoid(gi_i + gh_i)   f, o alike   g = tanh(gi_g + gh_g)    c = f c + i g   h = o tanh(c)
//   RNN        h = tanh(gi + gh), or max(0, gi + gh)
#pragma once
#include "simd.hpp"

namespace sparsefold {
namespace SPARSEFOLD_ISA {

static void reset_gate(const CellArgs& a) {
    const uint32_t units = pad(a.units);
    for (uint32_t j = 0; j < units; j += kLanes) store(a.r + j, sigmoid(add(load(a.gi + j), load(a.gh + j))));
}

/// f(unit, the state of sixteen units before any reset); z * (h - n) + n is (1 - z) n + z h with one rounding less. A
/// gate's operations wait for one another: in loops of their own many units' are under way at once, where one loop over
/// all gates would fill the processor's window with two.
template <class F>
SF_INLINE void each_state(const CellArgs& a, const F& f) {
    constexpr uint32_t kNear = 8 * kLanes;
    const uint32_t units = pad(a.units);
    const float *gi_z = a.gi + units, *gh_z = a.gh + units;
    const float *gi_n = gi_z + units, *gh_n = gh_z + units;
    alignas(64) float z[kNear], n[kNear];
    for (uint32_t first = 0; first < units; first += kNear) {
        const uint32_t end = units - first < kNear ? units : first + kNear;
        for (uint32_t j = first; j < end; j += kLanes)
            store(z + j - first, sigmoid(add(load(gi_z + j), load(gh_z + j))));
        for (uint32_t j = first; j < end; j += kLanes) {
            const F16 r = a.reset_after ? sigmoid(add(load(a.gi + j), load(a.gh + j))) : set1(1.0f);
            store(n + j - first, fma(r, load(gh_n + j), load(gi_n + j)));
        }
        for (uint32_t j = first; j < end; j += kLanes) {
            const F16 now = tanh(load(n + j - first));
            f(j, fma(load(z + j - first), sub(load(a.h + j), now), now));
        }
    }
}

static void cell_gru(CellArgs& a) {
    each_state(a, [&](uint32_t j, const F16& u) { store(a.h + j, u); });
}

/// The lanes of units that exist where `left` units are left: the padding never speaks, whatever it holds.
SF_INLINE uint32_t existing(uint32_t left) { return left < kLanes ? (1u << left) - 1 : 0xffff; }

static void cell_egru(CellArgs& a) {
    const F16 zoneout = set1(a.zoneout);
    uint32_t count = 0;
    each_state(a, [&](uint32_t j, F16 u) {
        if (a.reset == Reset::output) u = sub(u, load(a.y + j));
        u = fma(zoneout, sub(load(a.h + j), u), u);
        // A NaN counts as an event: it must reach the units that listen, as it does in the reference.
        const uint32_t events = not_le(u, load(a.crossing + j)) & existing(a.units - j);
        store(a.u + j, u);
        store(a.y + j, keep(events, u));
        store(a.h + j, a.reset == Reset::threshold ? sub(u, keep(events, load(a.threshold + j))) : u);
        count += compress(events, j, u, a.event_index + count, a.event_value + count);
    });
    a.event_count = count;
}

SF_INLINE F16 gate(const CellArgs& a, uint32_t at) { return add(load(a.gi + at), load(a.gh + at)); }

static void cell_lstm(CellArgs& a) {
    const uint32_t units = pad(a.units);
    for (uint32_t j = 0; j < units; j += kLanes) {
        const F16 i = sigmoid(gate(a, j)), f = sigmoid(gate(a, units + j)), g = tanh(gate(a, 2 * units + j));
        store(a.c + j, fma(f, load(a.c + j), mul(i, g)));
    }
    for (uint32_t j = 0; j < units; j += kLanes)
        store(a.h + j, mul(sigmoid(gate(a, 3 * units + j)), tanh(load(a.c + j))));
}

static void cell_rnn(CellArgs& a) {
    const uint32_t units = pad(a.units);
    for (uint32_t j = 0; j < units; j += kLanes) {
        const F16 x = gate(a, j);
        store(a.h + j, a.relu ? max(set1(0.0f), x) : tanh(x));
    }
}

static void cell_relu(CellArgs& a) {
    uint32_t count = 0;
    for (uint32_t j = 0; j < a.units; j += kLanes) {
        const F16 x = load(a.gi + j);
        const uint32_t events = not_le(x, set1(0.0f)) & existing(a.units - j);  // NaN is an event, as of an EGRU
        store(a.y + j, keep(events, x));
        count += compress(events, j, x, a.event_index + count, a.event_value + count);
    }
    a.event_count = count;
}

/// Values of unit j on: the op may be the first, and a caller's x ends with its last unit.
SF_INLINE F16 values_of(const CellArgs& a, uint32_t j) {
    return a.units - j < kLanes ? load_first(a.gi + j, a.units - j) : load(a.gi + j);
}

static void cell_events(CellArgs& a) {
    uint32_t count = 0;
    for (uint32_t j = 0; j < a.units; j += kLanes) {
        const F16 x = values_of(a, j), zero = set1(0.0f);
        const uint32_t events = (not_le(x, zero) | not_le(zero, x)) & existing(a.units - j);
        store(a.y + j, keep(events, x));
        count += compress(events, j, x, a.event_index + count, a.event_value + count);
    }
    a.event_count = count;
}

static void cell_delta(DeltaArgs& a) {
    const F16 threshold = set1(a.threshold), zero = set1(0.0f);
    uint32_t count = 0;
    for (uint32_t j = 0; j < a.units; j += kLanes) {
        const uint32_t left = a.units - j;  // x may be a caller's and ends with its last value
        const F16 x = left < kLanes ? load_first(a.x + j, left) : load(a.x + j), sent = load(a.sent + j);
        const F16 change = sub(x, sent);
        // A NaN is a change: it must reach the units, as it does where all of x is read.
        const uint32_t moved = not_le(max(sub(zero, change), change), threshold) & existing(left);
        store(a.sent + j, add(keep(moved, x), keep(~moved & 0xffff, sent)));
        count += compress(moved, j, change, a.index + count, a.change + count);
    }
    a.count = count;
}

/// Floats as integers of the same order, both zeros alike, what is no number above all.
SF_INLINE uint32_t order_of(float x) {
    const float one_zero = x + 0.0f;
    uint32_t bits;
    __builtin_memcpy(&bits, &one_zero, sizeof bits);
    return x != x ? 0xffffffffu : bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

/// The k-th largest key of each part is found bit by bit: the largest number that k keys reach.
static void cell_kwta(CellArgs& a) {
    const uint32_t width = a.units / a.groups;
    for (uint32_t j = 0; j < a.units; ++j) a.keys[j] = order_of(a.gi[j]);
    uint32_t count = 0;
    for (uint32_t first = 0; first < a.units; first += width) {
        const uint32_t* keys = a.keys + first;
        uint32_t limit = 0;
        for (uint32_t bit = 0x80000000u; bit; bit >>= 1) {
            uint32_t reach = 0;
            for (uint32_t j = 0; j < width; ++j) reach += keys[j] >= (limit | bit);
            if (reach >= a.k) limit |= bit;
        }
        uint32_t ties = a.k;  // of those that are just at the limit, the first ones speak
        for (uint32_t j = 0; j < width; ++j) ties -= keys[j] > limit;
        for (uint32_t j = 0; j < width; ++j) {
            const bool speaks = keys[j] > limit || (keys[j] == limit && ties != 0);
            if (speaks && keys[j] == limit) --ties;
            a.y[first + j] = speaks ? a.gi[first + j] : 0.0f;
            if (!speaks) continue;
            a.event_index[count] = first + j;
            a.event_value[count++] = a.gi[first + j];
        }
    }
    a.event_count = count;
}

/// max x and log(sum of exp(x - max x)), what lies 87 below the largest counted as e^-87.
static void cell_log_sum(LogSumArgs& a) {
    F16 most = set1(a.x[0]);
    uint32_t whole = 0;
    for (; whole + kLanes <= a.units; whole += kLanes) most = max(most, load(a.x + whole));
    float lane[kLanes];
    store(lane, most);
    float largest = lane[0];
    for (uint32_t j = 1; j < kLanes; ++j) largest = lane[j] > largest ? lane[j] : largest;
    for (uint32_t j = whole; j < a.units; ++j) largest = a.x[j] > largest ? a.x[j] : largest;
    F16 total = set1(0.0f);
    for (uint32_t j = 0; j < a.units; j += kLanes) {
        const F16 below = sub(load(a.x + j), set1(largest));
        total = add(total, keep(existing(a.units - j), exp(max(set1(-87.0f), below))));
    }
    a.largest = largest;
    a.log_sum = static_cast<float>(__builtin_log(sum(total)));
}

static void cell_log_softmax(NormArgs& a) {
    LogSumArgs of{a.units, a.y, 0, 0};
    cell_log_sum(of);
    const F16 largest = set1(of.largest), log_sum = set1(of.log_sum);
    for (uint32_t j = 0; j < a.units; j += kLanes) store(a.y + j, sub(sub(load(a.y + j), largest), log_sum));
}

static void cell_top_k(TopArgs& a) {
    uint32_t found = 0;
    for (uint32_t j = 0; j < a.units; ++j) {
        const uint32_t key = order_of(a.x[j]);
        if (found == a.k && key <= order_of(a.value[found - 1])) continue;
        uint32_t at = found < a.k ? found++ : found - 1;
        for (; at && key > order_of(a.value[at - 1]); --at) {
            a.value[at] = a.value[at - 1];
            a.index[at] = a.index[at - 1];
        }
        a.value[at] = a.x[j];
        a.index[at] = static_cast<float>(j);
    }
}

static void cell_layer_norm(NormArgs& a) {
    F16 total = set1(0.0f), squares = set1(0.0f);
    for (uint32_t j = 0; j < a.units; j += kLanes) total = add(total, keep(existing(a.units - j), load(a.y + j)));
    const float count = static_cast<float>(a.units);
    const F16 mean = set1(sum(total) / count);
    for (uint32_t j = 0; j < a.units; j += kLanes) {  // a second pass: a large mean must not swallow the variance
        const F16 d = keep(existing(a.units - j), sub(load(a.y + j), mean));
        squares = fma(d, d, squares);
    }
    const F16 scale = div(set1(1.0f), sqrt(set1(sum(squares) / count + a.epsilon)));
    for (uint32_t j = 0; j < a.units; j += kLanes)
        store(a.y + j, fma(mul(sub(load(a.y + j), mean), scale), load(a.weight + j), load(a.bias + j)));
}

static void activations(const float* x, float* s, float* t, uint32_t n) {
    for (uint32_t i = 0; i < n; i += kLanes) {
        store(s + i, sigmoid(load(x + i)));
        store(t + i, tanh(load(x + i)));
    }
}

#define SPARSEFOLD_TABLE_(isa) kernels_##isa
#define SPARSEFOLD_TABLE(isa) SPARSEFOLD_TABLE_(isa)

}  // namespace SPARSEFOLD_ISA

const Kernels SPARSEFOLD_TABLE(SPARSEFOLD_ISA) = {
#define SPARSEFOLD_MATVEC(format, dtype, Packed) \
    SPARSEFOLD_ISA::matvec_##format##_##dtype, SPARSEFOLD_ISA::matvec_events_##format##_##dtype,
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed) SPARSEFOLD_ISA::matvec_##format##_##dtype,
#define SPARSEFOLD_MATVEC_CODES(format, Packed) SPARSEFOLD_ISA::matvec_##format,
#define SPARSEFOLD_CELL(name, Args) SPARSEFOLD_ISA::cell_##name,
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
    SPARSEFOLD_ISA::scale, SPARSEFOLD_ISA::add_scaled, SPARSEFOLD_ISA::codes_of, SPARSEFOLD_ISA::reset_gate,
    SPARSEFOLD_ISA::activations};

}  // namespace sparsefold
