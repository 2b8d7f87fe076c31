// Playing a program: one Stream is one state with its own counters; many streams share one Program. `step` allocates
// nothing and counts integers only (events emitted, columns read); src/sparsefold/cost.py alone multiplies.
#pragma once
#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "dispatch.hpp"
#include "program.hpp"

namespace sparsefold {

struct Engine {
    Engine(Program program, const std::string& isa, uint64_t fold_limit);
    Program program;
    std::string isa;
    const Kernels* kernels;
};

/// State and counters of one op of one stream; pointers into the stream's arena.
struct OpState {
    CellArgs cell{};
    float* scaled = nullptr;             // r * y or r * h, when the reset gate acts before the product
    float* output = nullptr;             // linear, layer norm
    std::vector<uint64_t> events;        // EGRU, ReLU: per unit, events emitted
    std::vector<uint64_t> input_reads;   // per input column, how often its event was read; empty for dense x
    std::vector<uint64_t> hidden_reads;  // the same for the recurrent matrix; empty for dense h
};

class Stream {
  public:
    explicit Stream(std::shared_ptr<const Engine> engine);

    /// One step. Exactly one of `token` (in front of an embedding) and `x` (program.inputs() floats) is read; `out`
    /// receives program.outputs() floats. The caller has checked the token. `trace`, if given, receives one byte per
    /// unit of every EGRU and ReLU, in order: 1 where it emitted.
    void step(int64_t token, const float* x, float* out, uint8_t* trace = nullptr);
    void reset();  // state to zero; counters stay
    void reset_counters();
    void set_emitted(size_t op, const float* y);  // y of step t-1; what is not zero is an event

    const Engine& engine() const { return *engine_; }
    const OpState& state(size_t op) const { return states_[op]; }
    OpState& state(size_t op) { return states_[op]; }
    uint64_t steps() const { return steps_; }
    size_t trace_width() const { return trace_width_; }

    /// True while a step runs: a stream is used by one thread at a time.
    std::atomic<bool> busy{false};

  private:
    struct Signal {
        const float* dense = nullptr;
        Events events{};
    };
    const float* recurrent(const Op& op, OpState& state, int64_t token, const Signal& x);
    std::shared_ptr<const Engine> engine_;
    Buffer<float> arena_;
    std::vector<OpState> states_;
    std::vector<int8_t> codes_;  // room for a dense x in int8
    uint64_t steps_ = 0;
    size_t trace_width_ = 0;
};

}  // namespace sparsefold
