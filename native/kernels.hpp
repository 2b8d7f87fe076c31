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

// Training: one layer over a whole sequence (sequence.inl.hpp), in float and in double. Every function below is called
// by `members` threads at once, which share the work by their number; no bit of any result depends on how many there
// are.

constexpr uint32_t kTile = 4 * kLanes;  // outputs of one tile of a transposed matrix
constexpr uint32_t kSegment = kTile;    // inputs of one part of an event list, made by who makes a tile of outputs
constexpr uint32_t kNear = 2 * kLanes;  // inputs of one part of a list of needed gradients: their rows of a tile fit L1

/// Vectors of one gate in tile `tile`.
constexpr uint32_t tile_vectors(uint32_t units, uint32_t tile) {
    const uint32_t left = pad(units) / kLanes - tile * (kTile / kLanes);
    return left < kTile / kLanes ? left : kTile / kLanes;
}
constexpr uint32_t count_of_tiles(uint32_t units) { return (units + kTile - 1) / kTile; }
constexpr uint32_t count_of_segments(uint32_t units) { return (units + kSegment - 1) / kSegment; }
constexpr uint32_t count_of_near(uint32_t units) { return (units + kNear - 1) / kNear; }

struct Member {
    uint32_t number, members;
    void (*wait)(void* team);  // until every member is there
    void* team;
};

/// A weight (gates * units, cols) as the loops read it: tile after tile of kTile units (the last one narrower), each
/// holding of input 0, of input 1, ... the tile's units of gate 0, of gate 1, ..., in whole vectors filled up with
/// zeros.
template <class Real>
struct Transposed {
    const Real* values;
    uint32_t gates, units, cols;
};

template <class Real>
struct TransposeArgs {
    const Real* weight;  // gate after gate, `units` rows each
    Real* values;
    uint32_t gates, units, cols;
    uint32_t* wild;  // (members) out: 1 where a weight is not finite
};

constexpr uint32_t count_of_groups(uint32_t units) { return pad(units) / kLanes; }  // of kLanes units: a block's rows

/// The blocks of a weight (gates * units, cols), kLanes units of one gate against one input, that are not all zero;
/// input by input, and strip by strip of its tiles: strip s of `strips` begins at tile tiles * s / strips.
template <class Real>
struct BlockWeight {
    const uint32_t* start;  // (cols * strips + 1): where the blocks of an input and strip begin
    const uint32_t* row;    // (blocks) group * gates + gate, ascending for an input
    const Real* values;     // (blocks, kLanes), zeros where a gate ends
    // The same blocks row after row: where those of a row begin (groups * gates + 1), their inputs, ascending, and
    // values.
    const uint32_t *row_start, *col;
    const Real* by_row;
    uint32_t gates, units, cols, strips;
};

/// One pass over a weight: which of its blocks are live; and their values, as long as the same are as before.
template <class Real>
struct PackBlocksArgs {
    const Real* weight;
    uint32_t gates, units, cols, strips;
    const uint64_t* kept;  // (groups * gates, segments of cols) bits of blocks that are live whatever they hold; null
    uint64_t* live;        // alike; in: as they were, out: as they are
    const uint32_t *start, *row_start;  // of BlockWeight, null: values are not wanted
    Real *values, *by_row;
    uint32_t* cursor;  // (members, cols)
    uint8_t* changed;  // (members) out
    uint8_t* wild;     // (members) out: 1 where a weight is not finite
};

/// Who spoke, by segment of kSegment units: the list of segment s of row r begins at r * stride + s * kSegment.
template <class Real>
struct Spoken {
    uint32_t* index;  // within the segment, ascending
    Real* value;
    uint32_t* count;  // (segments, rows)
    uint64_t* any;    // (segments) bits of the units that spoke in any row; null where nobody asks
    size_t stride;
    uint32_t rows;
};

/// Whose gradient is needed, by part of kNear units, laid out like Spoken with stride pad(units) made whole parts; each
/// list is filled up to a multiple of four with its last index.
template <class Real>
struct Needed {
    uint32_t* index;
    Real* value;      // the gradients, in the order of the list
    uint32_t* count;  // (parts, rows)
    uint32_t* any;    // (parts)
    size_t stride;
};

/// What is not zero of x (rows, cols), part by part of kSegment columns, row by row. Entries of part p begin at p *
/// stride.
template <class Real>
struct Sifted {
    uint32_t rows, cols;
    size_t stride;    // sifted_stride(rows)
    uint32_t* start;  // (parts, rows + 1): where the entries of a row begin in its part
    uint32_t* lane;   // the column within the part, ascending in a row
    uint32_t* row;
    Real* value;
};
constexpr size_t sifted_stride(uint32_t rows) { return static_cast<size_t>(rows) * kSegment + kLanes; }

/// x may have its first rows elsewhere and each row scaled by another array's; rows that are wild are taken whole.
template <class Real>
struct SiftArgs {
    Sifted<Real> out;
    const Real* head;  // (head_rows, cols)
    uint32_t head_rows;
    const Real* rest;   // (rows - head_rows, cols)
    const Real* scale;  // (rows, scale_stride) or null
    size_t scale_stride;
    const uint8_t* wild;  // (rows) or null
};

/// out (rows, stride) = bias + W x of all rows of x.
template <class Real>
struct InputProductArgs {
    Transposed<Real> weight;
    BlockWeight<Real> blocks;  // read in its place where it is given
    Sifted<Real> x;
    const Real* dense;  // x (rows, cols), of which all is read; null; with blocks alone
    const Real* bias;   // (gates * units)
    Real* out;
    size_t stride;
    Real* room;             // (members, room_of_member)
    size_t room_of_member;  // product_rows(rows) * gates * kTile; with blocks gates * pad(units); where all of x is
                            // read kTogether * pad(cols) * kLanes
};
constexpr uint32_t kProductRows = 1024;  // whose sums of a tile fit L2
constexpr uint32_t product_rows(uint32_t rows) { return rows < kProductRows ? rows : kProductRows; }

/// out (rows, cols) = W^T g of all rows of g (rows, stride), whose gates lie one behind the other.
template <class Real>
struct InputGradientArgs {
    BlockWeight<Real> blocks;
    uint32_t rows;
    const Real* g;
    size_t stride;
    Real* out;
    Real* room;  // (members, kTogether, pad(cols), kLanes)
};
constexpr uint32_t kTogether = 4;  // tiles of kLanes rows that share the reading of a weight's blocks

enum class Event : uint32_t { threshold, always, smooth };

/// What forward and backward of an EGRU share; arrays are (steps, batch, units) where nothing else is said.
template <class Real>
struct EgruArgs {
    uint32_t steps, batch, units;
    Reset reset;
    bool reset_after;
    Event event;
    Real height, half_width;             // of the surrogate
    Transposed<Real> hidden;             // r, z, n; r and z alone where !reset_after
    Transposed<Real> hidden_n;           // n where !reset_after
    BlockWeight<Real> blocks, blocks_n;  // read in their place where they are given
    bool every;                          // a weight is not finite: silent units are read too, as 0 * inf is no number
    const Real* theta;                   // (units)
    const Real* mask;                    // zoneout in training: 1 where u is new, else the old h is kept; null
    Real keep;                           // without a mask: the share of the old h
    const Real *y0, *h0;                 // (batch, units)
    // (steps * batch, 4 * units): r, z, n and what r multiplies. The forward finds W_i x + b there in place of r, z, n.
    Real* tape;
    Real *u, *y;
};

template <class Real>
struct EgruForwardArgs : EgruArgs<Real> {
    Real* o;             // null: u and y are there already, and the tape alone is made again
    const Real* bias_n;  // (units) of what r multiplies; null for none, and where !reset_after
    Real* h;             // (batch, units) out: the state after the last step
    Spoken<Real> spoken[2];
    Real* scaled;         // like the values of a list: r * y where !reset_after
    Real* room;           // (members, room_of_sums)
    size_t room_of_sums;  // batch * 3 * kTile, with blocks gates * pad(units)
};

template <class Real>
struct EgruBackwardArgs : EgruArgs<Real> {
    const Real *grad_y, *grad_u, *grad_o;  // null for zeros
    const Real *grad_y_n, *grad_h_n;       // (batch, units), null for zeros
    bool wants_y0;
    Real* gates;      // (steps * batch, 4 * units) out: gradients of the sums of r, z, n, and of what r multiplies
    Real* dy;         // (batch, units) out: gradient of y0
    Real* dh;         // (batch, units) out: gradient of h0
    Real* dtheta;     // (units) out
    Real* dbias;      // (4 * units) out: `gates` summed
    uint8_t* wild;    // (steps * batch) out: 1 where a gradient is not finite
    bool all;         // with blocks: every gradient of a message is made, samples in the lanes
    Real* sent[2];    // by turns: r, z and what r multiplies (or r and z alone) of one step: (tiles, batch, gates,
                      // kTile), with blocks (batch, groups, gates, kLanes); with `all` zeros at first, (samples /
                      // kLanes, groups, gates, kLanes units, kLanes samples)
    Real* sent_n[2];  // n where !reset_after
    // With `all`: (members, kTogether, pad(units), kLanes); and where a member's inputs begin and end among the blocks
    // of each row of both weights, (members, groups, 3, 2).
    Real* room;
    uint32_t* bounds;
    Real* back;  // (batch, units) room where !reset_after
    Needed<Real> need;
};

/// out (gates * units, cols) = sum over rows of g(row) x(row)^T.
template <class Real>
struct OuterArgs {
    uint32_t units, gates;
    const Real* g;  // (rows, stride)
    size_t stride;
    uint32_t part[4];  // where in a row each gate begins, in units
    Sifted<Real> x;
    const uint64_t* live;  // (groups * gates, parts of x) bits of the blocks to make, zero elsewhere; null: all
    Real* out;
    Real* room;  // (members, outer_chunk(rows), gates * kPair)
};
constexpr uint32_t kPair = 2 * kLanes;  // units whose sums of a part of x fit L1
constexpr uint32_t kOuterRows = 2048;   // whose g of these units fits L2
constexpr uint32_t outer_chunk(uint32_t rows) {
    const uint32_t chunks = (rows + kOuterRows - 1) / kOuterRows;
    return chunks ? (rows + chunks - 1) / chunks : 0;
}

/// out (gates * units, cols) += sum over rows of g(row) x(row)^T in a weight's live blocks.
template <class Real>
struct OuterBlocksArgs {
    uint32_t rows, units, cols, gates;
    const Real* g;  // (rows, stride)
    size_t stride;
    uint32_t part[4];  // where in a row each gate begins
    const Real* head;  // x (rows, cols): its first rows,
    uint32_t head_rows;
    const Real* rest;       // and the others
    const uint32_t* start;  // (groups * gates + 1): where the blocks of a group and gate begin
    const uint32_t* col;    // (blocks) ascending
    Real* sums;             // (blocks, kLanes) room, zeros
    Real* out;
    // By turns x turned over, (2, pad(cols), kTurned); or of each input what is not zero, the rows where that is, and
    // how many, (2, pad(cols)). Without `row` all of x is read.
    Real* room;
    uint16_t *row, *count;
    const uint8_t* wild;  // (rows) 1 where g is not finite: zeros of x count as others do there; null for none
};
constexpr uint32_t kTurned = 256;  // rows of x that are turned over at a time: their g fits L1

#include "gated.hpp"

/// A set that has nothing better to offer for training leaves its sequences null.
struct Kernels {
#define SPARSEFOLD_MATVEC(format, dtype, Packed)                                \
    void (*matvec_##format##_##dtype)(const Packed&, const float* x, float* y); \
    void (*matvec_events_##format##_##dtype)(const Packed&, const Events& x, float* y);
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed) \
    void (*matvec_##format##_##dtype)(const Packed&, const float* x, float* y);
#define SPARSEFOLD_MATVEC_CODES(format, Packed) \
    void (*matvec_##format)(const Packed&, const int8_t* x, float x_scale, float* y);
#define SPARSEFOLD_CELL(name, Args) void (*cell_##name)(Args&);
#define SPARSEFOLD_SEQUENCE(name, Args)                    \
    void (*name##_f32)(const Args<float>&, const Member&); \
    void (*name##_f64)(const Args<double>&, const Member&);
#include "kernels.def"
#undef SPARSEFOLD_SEQUENCE
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
    void (*scale)(float* y, const float* s, uint32_t n);  // y *= s, n padded
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
