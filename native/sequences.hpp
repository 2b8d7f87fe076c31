// Training: what the kernels of one layer over a whole sequence read, in float and in double, and the table that holds
// them. Every one is called by `members` threads at once, which share the work by their number; no bit of any result
// depends on how many there are. Plain structs only, no templates of std (docs/decisions/0003).
#pragma once
#include "kernels.hpp"

namespace sparsefold {

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

// The cells whose state is dense (gated.inl.hpp).

/// gru_before: the reset gate acts on the state, before the product. tanh and relu: the plain recurrent unit.
enum class Gated : uint32_t { gru, gru_before, lstm, tanh, relu };

/// Gates whose rows stand in weight_hh, and values of a step that the tape holds for each unit and sample: r, z, n and
/// what r multiplies; r, z, n; i, f, g, o; or the new state.
constexpr uint32_t gates_of(Gated kind) { return kind == Gated::lstm ? 4 : kind >= Gated::tanh ? 1 : 3; }
constexpr uint32_t tape_of(Gated kind) { return kind == Gated::gru ? 4 : gates_of(kind); }

/// A matrix (outputs, depth) in panels of `gates` times `vectors` vectors, of the same units in every gate; a panel
/// holds what input 0 is multiplied with, input 1, ..., filled up with zeros.
template <class Real>
struct Panels {
    Real* values;
    uint32_t gates, vectors, units, depth;
};
constexpr uint32_t count_of_panels(uint32_t units, uint32_t vectors) {
    return (units + vectors * kLanes - 1) / (vectors * kLanes);
}
constexpr uint32_t kPanelVectors = 4;  // at most, gates times vectors

/// What both directions share; arrays are (steps, batch, units) where nothing else is said.
template <class Real>
struct GatedArgs {
    Gated kind;
    uint32_t steps, batch, units;
    const Real* weight;           // weight_hh (gates * units, units)
    const int32_t* live;          // (steps) samples, the first ones, that are not at their end; null for all
    const Real *mask_h, *mask_c;  // zoneout in training: 1 where the state is new, else the old one is kept; null
    Real keep_h, keep_c;          // without a mask: the share of the old state
    const Real *h0, *c0;          // (batch, units); c of an LSTM alone
    Real* tape;                   // (steps * batch, tape_of * units). The forward finds W_i x + b there.
    Real *out, *cells;            // h and, of an LSTM, c
    // One of both: room for the packed weight, or its live blocks, where they are few. _n: n of gru_before, which waits
    // for r.
    Panels<Real> panels, panels_n;
    BlockWeight<Real> blocks, blocks_n;
    bool lanes;     // with blocks: the samples lie in the lanes
    uint8_t* wild;  // zeros at first, 1 where a factor of weight_hh is not finite: (steps * batch) of what is sent
                    // back, with blocks; (batch) of the state, ever, in lanes
    Real* room;     // (members, room_of_sums)
    size_t room_of_sums;
};

template <class Real>
struct GatedForwardArgs : GatedArgs<Real> {
    const Real* bias_n;  // (units) of what r multiplies in a gru; null for none
    // By turns h as the product reads it: (units, batch) for panels; in lanes, zeros at first, (samples / kLanes,
    // groups, kLanes units, kLanes samples).
    Real* state[2];
    Real* scaled;  // alike r * h, of gru_before; (batch, units) with blocks, if not in lanes
};

template <class Real>
struct GatedBackwardArgs : GatedArgs<Real> {
    const Real *grad_out, *grad_cells;  // null for zeros
    const Real *grad_h_n, *grad_c_n;    // (batch, units), null for zeros
    Real* gates;    // (steps * batch, tape_of * units) out: gradients of the sums, and of what r multiplies
    Real *dh, *dc;  // (batch, units) out: gradients of h0 and c0
    Real* dbias;    // (tape_of * units) out: `gates` summed
    // By turns what weight_hh is multiplied with: (gates * units, batch); with blocks (batch, groups, gates, kLanes),
    // in lanes, zeros at first, (samples / kLanes, groups, gates, kLanes units, kLanes samples); in a gru_before of r
    // and z, and behind them of n.
    Real* sent[2];
    uint32_t* bounds;  // in lanes: (members, groups, gates, 2), where a member's inputs begin and end among each row's
    Real* back;        // (batch, units) room of gru_before
};

/// The training kernels of one real type.
template <class Real>
struct SequenceKernels {
#define SPARSEFOLD_SEQUENCE(name, Args) void (*name)(const Args<Real>&, const Member&);
#include "sequences.def"
#undef SPARSEFOLD_SEQUENCE
};

struct Sequences {
    SequenceKernels<float> f32;
    SequenceKernels<double> f64;
    const SequenceKernels<float>& of(float) const { return f32; }
    const SequenceKernels<double>& of(double) const { return f64; }
};

extern const Sequences sequences_generic;
extern const Sequences sequences_avx2;
extern const Sequences sequences_avx512;  // avx512vnni too: training multiplies no codes
extern const Sequences sequences_neon;

}  // namespace sparsefold
