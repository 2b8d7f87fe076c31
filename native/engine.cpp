#include "engine.hpp"

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

namespace sparsefold {

namespace {

/// Denormal numbers count as zero while this lives: a decaying state must not slow the processor down a hundredfold.
class FlushDenormals {
  public:
#if defined(__x86_64__)
    FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
    ~FlushDenormals() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    FlushDenormals() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        set(saved_ | kFlushToZero);
    }
    ~FlushDenormals() { set(saved_); }

  private:
    static constexpr uint64_t kFlushToZero = 1u << 24;  // FPCR.FZ: of what is read and of what is written
    static void set(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value) : "memory"); }
    uint64_t saved_;
#endif
};

void count(std::vector<uint64_t>& counters, const Events& events) {
    for (uint32_t k = 0; k < events.count; ++k) ++counters[events.index[k]];
}

}  // namespace

Engine::Engine(Program p, const std::string& isa_name, uint64_t fold_limit)
    : program(std::move(p)), kernels(&sparsefold::kernels(isa_name, &isa)) {
    program.complete();
    const FlushDenormals flush;  // as in `step`, or folding would change bits where weights are denormal
    program.fold(*kernels, fold_limit);
}

Stream::Stream(std::shared_ptr<const Engine> engine) : engine_(std::move(engine)) {
    static_assert(sizeof(float) == sizeof(uint32_t), "event indices live in the arena of floats");
    const std::vector<Op>& ops = engine_->program.ops();
    states_.resize(ops.size());
    const auto lay_out = [&](float* base) {  // once to measure, once to assign
        float* at = base;
        const auto take = [&](size_t n) {
            float* p = at;
            at += pad(static_cast<uint32_t>(n));
            return p;
        };
        for (size_t i = 0; i < ops.size(); ++i) {
            const Op& op = ops[i];
            OpState& s = states_[i];
            const uint32_t units = pad(op.outputs);
            if (!op.recurrent() && !op.speaks() && op.kind != Op::Kind::embedding) s.output = take(units);
            if (op.kind == Op::Kind::kwta) s.cell.keys = reinterpret_cast<uint32_t*>(take(units));
            if (op.recurrent()) {
                s.cell.gi = take(size_t{op.gates} * units);
                s.cell.gh = take(size_t{op.gates} * units);
                s.cell.h = take(units);
            }
            if (op.kind == Op::Kind::lstm) s.cell.c = take(units);
            if (op.kind == Op::Kind::gru || op.kind == Op::Kind::egru) {
                s.cell.r = take(units);
                s.scaled = take(units);
            }
            if (op.kind == Op::Kind::egru) s.cell.u = take(units);
            if (!op.speaks()) continue;
            s.cell.y = take(units);
            s.cell.event_index = reinterpret_cast<uint32_t*>(take(units));
            s.cell.event_value = take(units);
        }
        return static_cast<size_t>(at - base);
    };
    Buffer<float> unit(1);  // pointer arithmetic needs a real object; nothing is written in the measuring pass
    arena_ = Buffer<float>(lay_out(unit.data()));
    lay_out(arena_.data());
    for (size_t i = 0; i < ops.size(); ++i) {
        const Op& op = ops[i];
        OpState& s = states_[i];
        for (const Matrix* m : {&op.input, &op.hidden, &op.hidden_n})
            if (m->code_bytes() > codes_.size()) codes_.resize(m->code_bytes());
        if (op.reads_events) s.input_reads.assign(op.inputs, 0);
        if (op.recurrent() || op.speaks()) s.cell.units = op.outputs;
        s.cell.reset_after = op.reset_after;
        s.cell.relu = op.relu;
        s.cell.k = op.k;
        s.cell.groups = op.groups;
        if (op.speaks()) {
            s.events.assign(op.outputs, 0);
            trace_width_ += op.outputs;
        }
        if (op.kind != Op::Kind::egru) continue;
        s.cell.reset = op.reset;
        s.cell.zoneout = op.zoneout;
        s.cell.threshold = op.threshold.data();
        s.cell.crossing = op.crossing.data();
        s.hidden_reads.assign(op.outputs, 0);
    }
}

void Stream::reset() {
    std::memset(arena_.data(), 0, arena_.size() * sizeof(float));
    for (OpState& s : states_) s.cell.event_count = 0;
}

void Stream::reset_counters() {
    steps_ = 0;
    for (OpState& s : states_)
        for (auto* counters : {&s.events, &s.input_reads, &s.hidden_reads}) counters->assign(counters->size(), 0);
}

void Stream::set_emitted(size_t op, const float* y) {
    CellArgs& cell = states_[op].cell;
    cell.event_count = 0;
    for (uint32_t j = 0; j < cell.units; ++j) {
        cell.y[j] = y[j];
        if (y[j] == 0.0f) continue;
        cell.event_index[cell.event_count] = j;
        cell.event_value[cell.event_count++] = y[j];
    }
}

const float* Stream::recurrent(const Op& op, OpState& s, int64_t token, const Signal& x) {
    const Kernels& k = *engine_->kernels;
    CellArgs& cell = s.cell;
    const uint32_t units = pad(op.outputs);
    const size_t stride = size_t{op.gates} * units, gates_bytes = stride * sizeof(float);
    const Events spoken{cell.event_index, cell.event_value, cell.event_count};
    const bool egru = op.kind == Op::Kind::egru;

    // The folded table holds W_i x + b_i of every token; reading it in place saves the copy.
    float* const gi = const_cast<float*>(cell.gi);
    float* const gh = const_cast<float*>(cell.gh);
    if (op.table.size()) {
        cell.gi = op.table.data() + static_cast<size_t>(token) * stride;
    } else {
        std::memcpy(gi, op.bias_input.data(), gates_bytes);
        if (op.reads_events) {
            count(s.input_reads, x.events);
            op.input.matvec(k, x.events, gi);
        } else {
            op.input.matvec(k, x.dense, gi, codes_.data());
        }
    }

    std::memcpy(gh, op.bias_hidden.data(), gates_bytes);
    if (egru) {
        count(s.hidden_reads, spoken);
        op.hidden.matvec(k, spoken, gh);
    } else {
        op.hidden.matvec(k, cell.h, gh, codes_.data());
    }
    if (!op.reset_after) {
        k.reset_gate(cell);
        float* const gh_n = gh + size_t{2} * units;
        if (egru) {
            for (uint32_t e = 0; e < spoken.count; ++e) s.scaled[e] = cell.r[spoken.index[e]] * spoken.value[e];
            op.hidden_n.matvec(k, Events{spoken.index, s.scaled, spoken.count}, gh_n);
        } else {
            for (uint32_t j = 0; j < units; ++j) s.scaled[j] = cell.r[j] * cell.h[j];
            op.hidden_n.matvec(k, s.scaled, gh_n, codes_.data());
        }
    }

    const auto pointwise = egru                        ? k.cell_egru
                           : op.kind == Op::Kind::lstm ? k.cell_lstm
                           : op.kind == Op::Kind::rnn  ? k.cell_rnn
                                                       : k.cell_gru;
    pointwise(cell);
    cell.gi = gi;
    return egru ? (op.emits_events ? cell.y : cell.u) : cell.h;
}

void Stream::step(int64_t token, const float* x, float* out, uint8_t* trace) {
    const FlushDenormals flush;
    const std::vector<Op>& ops = engine_->program.ops();
    const Kernels& k = *engine_->kernels;
    Signal signal;
    signal.dense = x;
    for (size_t i = 0; i < ops.size(); ++i) {
        const Op& op = ops[i];
        OpState& s = states_[i];
        switch (op.kind) {
            case Op::Kind::embedding:
                if (!op.folded) signal.dense = op.table.data() + static_cast<size_t>(token) * pad(op.outputs);
                break;
            case Op::Kind::linear:
                std::memcpy(s.output, op.bias_input.data(), op.bias_input.size() * sizeof(float));
                if (op.reads_events) {
                    count(s.input_reads, signal.events);
                    op.input.matvec(k, signal.events, s.output);
                } else {
                    op.input.matvec(k, signal.dense, s.output, codes_.data());
                }
                signal.dense = s.output;
                break;
            case Op::Kind::relu:
            case Op::Kind::events:
            case Op::Kind::kwta:
                s.cell.gi = signal.dense;
                (op.kind == Op::Kind::relu     ? k.cell_relu
                 : op.kind == Op::Kind::events ? k.cell_events
                                               : k.cell_kwta)(s.cell);
                signal.dense = s.cell.y;
                break;
            case Op::Kind::log_softmax: {
                std::memcpy(s.output, signal.dense, op.outputs * sizeof(float));
                NormArgs args{op.outputs, 0, nullptr, nullptr, s.output};
                k.cell_log_softmax(args);
                signal.dense = s.output;
                break;
            }
            case Op::Kind::top_k: {
                TopArgs args{op.inputs, op.k, signal.dense, s.output, s.output + op.k};
                k.cell_top_k(args);
                signal.dense = s.output;
                break;
            }
            case Op::Kind::layer_norm: {
                std::memcpy(s.output, signal.dense, op.outputs * sizeof(float));
                NormArgs norm{op.outputs, op.epsilon, op.scale.data(), op.bias_input.data(), s.output};
                k.cell_layer_norm(norm);
                signal.dense = s.output;
                break;
            }
            default:
                signal.dense = recurrent(op, s, token, signal);
        }
        if (!op.speaks()) continue;
        signal.events = {s.cell.event_index, s.cell.event_value, s.cell.event_count};
        count(s.events, signal.events);
        if (!trace) continue;
        std::memset(trace, 0, op.outputs);
        for (uint32_t e = 0; e < signal.events.count; ++e) trace[signal.events.index[e]] = 1;
        trace += op.outputs;
    }
    std::memcpy(out, signal.dense, ops.back().outputs * sizeof(float));
    ++steps_;
}

}  // namespace sparsefold
