// Training of the cells whose state is dense, a whole sequence: what gated.inl.hpp reads. Included by kernels.hpp.

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
