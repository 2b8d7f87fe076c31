// What the kernels read, and the table that holds them. Included by every instruction set's file: plain structs only,
// no templates of std (docs/decisions/0003).
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsefold {

constexpr uint32_t kLanes = 16;  // rows of one vector; every gate starts at a multiple of it
constexpr uint32_t kCodeColumns = 16;
constexpr uint32_t kMarkedColumns = 4096;  // at most, where a strip's columns are marked by bits
constexpr uint32_t kPanel = 128;           // rows of one panel of a packed dense matrix

constexpr uint32_t pad(uint32_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

/// A weight as the upper half of a float32.
struct bf16 {
    uint16_t bits;
};

// Packed matrices, by the type of their values: float, bf16, or int8_t, whose product the caller scales by row.

/// Packed dense matrix: panels of kPanel rows (the last one narrower), each holding its part of column 0, of column 1,
/// ...
template <class Value>
struct Dense {
    const Value* values;
    uint32_t rows;  // padded to kLanes
    uint32_t cols;
};

/// Packed block matrix, by input column: column c owns segments [start[c], start[c+1]); a segment is `height`
/// consecutive outputs beginning at row[s]. Blocks of 16·k rows are cut into segments of 16 at load, so that `height`
/// is 16 for them; a height of 1 is a compressed sparse column. Heights that divide 16 never reach over the padding of
/// a gate, so that only the others need to know how many of their rows exist.
template <class Value>
struct Block {
    const Value* values;     // (segments, height)
    const uint16_t* row16;   // (segments) where every row fits 16 bits, else null
    const uint32_t* row32;   // (segments) otherwise
    const uint32_t* length;  // (segments) rows that exist; null for heights 1, 4, 8 and 16
    const uint32_t* start;   // (cols + 1)
    uint32_t height;
    uint32_t cols;
};

/// Packed block matrix for dense x, by output: strip p is rows [p * height, (p + 1) * height) of the padded product and
/// owns vectors [start[p], start[p + 1]). A vector is kLanes weights, kLanes / height columns of the strip one after
/// the other; the last vector of a strip may be short. Heights divide kLanes.
template <class Value>
struct Rows {
    const Value* values;       // (vectors, kLanes / height, height)
    const uint16_t* column16;  // (vectors, kLanes / height) where every column fits 16 bits, else null
    const uint32_t* column32;  // (vectors, kLanes / height) otherwise
    const uint32_t* start;     // (strips + 1)
    const uint16_t* tail;      // (strips) lanes of the strip's last vector that exist, as bits; null for height 16
    const float* scale;        // (padded rows) of int8 codes, else null
    uint32_t height;
    uint32_t strips;
};

/// The same for x in int8 codes: four columns stand side by side in each of the sixteen lanes. A strip is filled up
/// with zeros to whole vectors and to a multiple of kCodeColumns columns. x holds 64 codes more than it has columns.
struct RowsOfCodes {
    const int8_t* values;      // (vectors, 4 * kLanes): lane i holds row i % height of columns 4 * (i / height) on
    const uint16_t* column16;  // (vectors, 4 * kLanes / height) where every column fits 16 bits, else null
    const uint32_t* column32;  // (vectors, 4 * kLanes / height) otherwise; null too where height 16 holds all columns
    const uint32_t* start;     // (strips + 1)
    const float* scale;        // (padded rows)
    const uint64_t* marks;     // (strips, words) bit i of word k: column 64 k + i; null but for height 16
    const int32_t* added;      // (padded rows) 128 times the sum of a row's codes; null as `marks`
    uint32_t words;
    uint32_t height;
    uint32_t strips;
};

/// Packed complementary matrix of groups of one row: in every column each of a gate's `sets` has one live row among
/// `overlay`, row q * sets + s of the gate. By gate and by tile of kLanes sets, each tile column after column.
template <class Value>
struct Complementary {
    const Value* values;  // (gates, tiles, cols, kLanes)
    const uint8_t* live;  // (gates, tiles, cols, kLanes) q of each set, kNoGroup where no row lives
    uint32_t gates, units, cols, sets, overlay;
};
constexpr uint8_t kNoGroup = 255;

/// The units that spoke: index ascending.
struct Events {
    const uint32_t* index;
    const float* value;
    uint32_t count;
};

enum class Reset : uint32_t { threshold, output, none };

/// One pointwise step of `units` units; every array is padded to kLanes, gates lie `pad(units)` apart, in torch's
/// order: r, z, n of GRU and EGRU; i, f, g, o of an LSTM; one of a plain RNN.
struct CellArgs {
    uint32_t units;
    bool reset_after;    // true: n reads r * gh_n; false: `gh_n` was already made from r * y (or r * h)
    bool relu;           // RNN only: max(0, x) in place of tanh
    const float* gi;     // (gates, padded)  W_i x + b_i
    const float* gh;     // (gates, padded)  W_h y + b_h
    float* r;            // (padded)         reset gate; written by `reset_gate`, read when !reset_after
    float* h;            // (padded)         carried state, in and out
    float* c;            // (padded)         LSTM only: the cell's state, in and out
    uint32_t k, groups;  // KWTA only: units that speak in each of `groups` equal parts
    uint32_t* keys;      // (padded) KWTA only: room
    // EGRU; ReLU, Events and KWTA read `units` values of gi and write from y on
    Reset reset;
    float zoneout;
    const float* threshold;  // (padded) what a reset subtracts
    const float* crossing;   // (padded) what u must exceed: the threshold, or -inf where every unit always emits
    float* u;                // (padded) state before the reset
    float* y;                // (padded) emitted value, in (the step before) and out
    uint32_t* event_index;   // (padded) units that emitted, ascending
    float* event_value;
    uint32_t event_count;  // out
};

/// What of `units` values differs by more than the threshold from what was sent of it, index ascending; it is sent now.
struct DeltaArgs {
    uint32_t units;
    float threshold;
    const float* x;   // (units)
    float* sent;      // (padded) in and out
    uint32_t* index;  // (padded)
    float* change;    // (padded) x - sent
    uint32_t count;   // out
};

/// y = (y - mean) / sqrt(variance + epsilon) * weight + bias, over `units` values; every array is padded to kLanes.
struct NormArgs {
    uint32_t units;
    float epsilon;
    const float* weight;
    const float* bias;
    float* y;  // in and out
};  // log_softmax reads units and y alone

/// What a log-softmax of `units` values takes from each: x - largest - log_sum.
struct LogSumArgs {
    uint32_t units;
    const float* x;          // (padded); what is read beyond `units` counts for nothing
    float largest, log_sum;  // out
};

/// Indices and values of the `k` largest of `units` values, largest first, ties to the lower index, NaN above all.
struct TopArgs {
    uint32_t units, k;
    const float* x;
    float* index;  // (k)
    float* value;  // (k)
};

struct Kernels {
#define SPARSEFOLD_MATVEC(format, dtype, Packed)                                \
    void (*matvec_##format##_##dtype)(const Packed&, const float* x, float* y); \
    void (*matvec_events_##format##_##dtype)(const Packed&, const Events& x, float* y);
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed) \
    void (*matvec_##format##_##dtype)(const Packed&, const float* x, float* y);
#define SPARSEFOLD_MATVEC_CODES(format, Packed) \
    void (*matvec_##format)(const Packed&, const int8_t* x, float x_scale, float* y);
#define SPARSEFOLD_CELL(name, Args) void (*cell_##name)(Args&);
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
    void (*scale)(float* y, const float* s, const float* b,
                  uint32_t n);  // y = y * s + b (y = y * s without b), n padded
    void (*add_scaled)(float* y, const float* x, const float* s,
                       uint32_t n);  // y += x * s (y += x without s), n padded
    // x as codes from -127 to 127 times what it returns; NaN where a value is not finite
    float (*codes_of)(const float* x, int8_t* codes, uint32_t n);
    void (*reset_gate)(const CellArgs&);                                           // r = sigmoid(gi_r + gh_r)
    void (*activations)(const float* x, float* sigmoid, float* tanh, uint32_t n);  // n padded; for the accuracy test
};

extern const Kernels kernels_generic;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512vnni;
extern const Kernels kernels_neon;

}  // namespace sparsefold
