#include "engine.hpp"

#include <unistd.h>

#include <algorithm>
#include <tuple>
#include <type_traits>

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

/// Tells the processor that a loop waits.
void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

void count(std::vector<uint64_t>& counters, const Events& events) {
    for (uint32_t k = 0; k < events.count; ++k) ++counters[events.index[k]];
}

/// A bias to where a product is added to it.
void copy(const float* to, const Buffer<float>& bias) {
    std::memcpy(const_cast<float*>(to), bias.data(), bias.size() * sizeof(float));
}

/// What an op without weights to multiply makes of one stream's x.
const float* pointwise(const Kernels& k, const Op& op, OpState& s, const float* x) {
    switch (op.kind) {
        case Op::Kind::log_softmax: {
            std::memcpy(s.output, x, op.outputs * sizeof(float));
            NormArgs args{op.outputs, 0, nullptr, nullptr, s.output};
            k.cell_log_softmax(args);
            return s.output;
        }
        case Op::Kind::top_k: {
            TopArgs args{op.inputs, op.k, x, s.output, s.output + op.k};
            k.cell_top_k(args);
            return s.output;
        }
        case Op::Kind::layer_norm: {
            std::memcpy(s.output, x, op.outputs * sizeof(float));
            NormArgs norm{op.outputs, op.epsilon, op.scale.data(), op.bias_input.data(), s.output};
            k.cell_layer_norm(norm);
            return s.output;
        }
        default:
            s.cell.gi = x;
            (op.kind == Op::Kind::relu     ? k.cell_relu
             : op.kind == Op::Kind::events ? k.cell_events
                                           : k.cell_kwta)(s.cell);
            return s.cell.y;
    }
}

using One = std::integral_constant<size_t, 1>;
template <class N>
constexpr size_t room = kBatch;
template <>
constexpr size_t room<One> = 1;

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
    uint32_t most_changes = 0, most_sums = 0, most_projected = 0, most_words = 0;
    for (const Op& op : ops) {
        if (op.kind == Op::Kind::cluster) {
            most_projected = std::max(most_projected, op.input.padded_rows());
            most_words = std::max(most_words, op.hidden.padded_rows());
        }
        for (const auto& [threshold, size, matrix] :
             {std::tuple(op.delta.input, op.inputs, &op.input), std::tuple(op.delta.hidden, op.outputs, &op.hidden)})
            if (threshold >= 0) {
                most_changes = std::max(most_changes, size);
                most_sums = std::max(most_sums, matrix->padded_rows());
            }
    }
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
            if (op.kind == Op::Kind::cluster) {  // grows where it stands: many small ones cost no more than the last
                s.output = states_[i - 1].output;
                continue;
            }
            if (op.kind == Op::Kind::log_softmax) {
                size_t last = i;
                while (last + 1 < ops.size() && ops[last + 1].kind == Op::Kind::cluster) ++last;
                s.output = take(ops[last].outputs);
                continue;
            }
            if (!op.recurrent() && !op.speaks() && op.kind != Op::Kind::embedding) s.output = take(units);
            if (op.kind == Op::Kind::conv1d) {
                const size_t slots = size_t{op.kernel} * op.dilation, window = size_t{op.kernel} * op.inputs;
                History& h = s.history;
                if (op.reads_events) {
                    h.index = reinterpret_cast<uint32_t*>(take(slots * op.inputs));
                    h.value = take(slots * op.inputs);
                    h.count = reinterpret_cast<uint32_t*>(take(slots));
                    h.window_index = reinterpret_cast<uint32_t*>(take(window));
                    h.window_value = take(window);
                } else {
                    h.dense = take(2 * slots * op.inputs);
                }
            }
            if (op.kind == Op::Kind::kwta) s.cell.keys = reinterpret_cast<uint32_t*>(take(units));
            if (op.recurrent()) {
                s.cell.gi = take(size_t{op.gates} * units);
                s.cell.gh = take(size_t{op.gates} * units);
                s.cell.h = take(units);
            }
            if (op.sends_changes()) s.age = take(1);
            if (op.delta.input >= 0) s.sent_x = take(op.inputs);
            if (op.delta.hidden >= 0) s.sent_h = take(units);
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
        changed_ = reinterpret_cast<uint32_t*>(take(most_changes));
        change_ = take(most_changes);
        sums_ = take(most_sums);
        projected_ = take(most_projected);
        words_ = take(most_words);
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
        if (op.reads_events || op.delta.input >= 0) s.input_reads.assign(op.input.cols(), 0);
        if (op.delta.hidden >= 0) s.hidden_reads.assign(op.outputs, 0);
        if (op.recurrent() || op.speaks()) s.cell.units = op.outputs;
        s.cell.reset_after = op.reset_after;
        s.cell.relu = op.relu;
        s.cell.k = op.k;
        s.cell.groups = op.groups;
        if (op.speaks()) {
            s.events.assign(op.outputs, 0);
            s.trace_at = trace_width_;
            trace_width_ += op.outputs;
        }
        if (op.kind != Op::Kind::egru) continue;
        s.cell.reset = op.reset;
        s.cell.zoneout = op.zoneout;
        s.cell.threshold = op.threshold.data();
        s.cell.crossing = op.crossing.data();
        s.hidden_reads.assign(op.outputs, 0);
    }
    reset();
}

void Stream::reset() {
    std::memset(arena_.data(), 0, arena_.size() * sizeof(float));
    for (size_t i = 0; i < states_.size(); ++i) {
        const Op& op = engine_->program.ops()[i];
        OpState& s = states_[i];
        s.cell.event_count = 0;
        if (op.delta.input >= 0) copy(s.cell.gi, op.bias_input);
        if (op.delta.hidden >= 0) copy(s.cell.gh, op.bias_hidden);
    }
}

void Stream::reset_counters() {
    steps_ = 0;
    for (OpState& s : states_) {
        s.asked = 0;
        for (auto* counters : {&s.events, &s.input_reads, &s.hidden_reads}) counters->assign(counters->size(), 0);
    }
}

Carried Stream::changes(size_t op, const std::string& name) {
    const Op& of = engine_->program.ops()[op];
    const OpState& s = states_[op];
    if (name == "age") return {s.age, 1};
    if (name == "sent_x") return {s.sent_x, of.inputs};
    if (name == "sent_h") return {s.sent_h, of.outputs};
    if (name == "memory_x" && s.sent_x) return {const_cast<float*>(s.cell.gi), of.outputs, of.gates};
    if (name == "memory_h" && s.sent_h) return {const_cast<float*>(s.cell.gh), of.outputs, of.gates};
    return {};
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

size_t Stream::history_size(size_t op) const {
    const Op& o = engine_->program.ops()[op];
    return size_t{o.history()} * o.inputs;
}

namespace {

/// visit(row of the history, the oldest first, its slot, place of that in its phase and phase)
template <class Visit>
void each_remembered(const Op& op, const History& h, const Visit& visit) {
    uint32_t phase = h.phase, turn = h.turn;
    for (uint32_t row = 0; row < op.history(); ++row) {
        // The next input takes the slot of the one that all taps have passed: the oldest that is left lies one turn on.
        visit(row, phase, turn + 1 == op.kernel ? 0 : turn + 1);
        if (++phase < op.dilation) continue;
        phase = 0;
        if (++turn == op.kernel) turn = 0;
    }
}

}  // namespace

void Stream::history(size_t op, float* x) const {
    const Op& o = engine_->program.ops()[op];
    const History& h = states_[op].history;
    each_remembered(o, h, [&](uint32_t row, uint32_t phase, uint32_t turn) {
        float* const to = x + size_t{row} * o.inputs;
        const size_t slot = size_t{phase} * o.kernel + turn;
        if (h.dense) {
            std::memcpy(to, h.dense + (slot + size_t{phase} * o.kernel) * o.inputs, o.inputs * sizeof(float));
            return;
        }
        std::fill_n(to, o.inputs, 0.0f);
        for (uint32_t e = 0; e < h.count[slot]; ++e) to[h.index[slot * o.inputs + e]] = h.value[slot * o.inputs + e];
    });
}

void Stream::set_history(size_t op, const float* x) {
    const Op& o = engine_->program.ops()[op];
    History& h = states_[op].history;
    each_remembered(o, h, [&](uint32_t row, uint32_t phase, uint32_t turn) {
        const float* const from = x + size_t{row} * o.inputs;
        const size_t slot = size_t{phase} * o.kernel + turn;
        if (h.dense) {
            float* const to = h.dense + (slot + size_t{phase} * o.kernel) * o.inputs;
            for (const size_t twice : {size_t{0}, size_t{o.kernel}})
                std::memcpy(to + twice * o.inputs, from, o.inputs * sizeof(float));
            return;
        }
        h.count[slot] = 0;
        for (uint32_t j = 0; j < o.inputs; ++j) {
            if (from[j] == 0.0f) continue;
            h.index[slot * o.inputs + h.count[slot]] = j;
            h.value[slot * o.inputs + h.count[slot]++] = from[j];
        }
    });
}

/// What the product of convolution i reads at this step; x is remembered.
Stream::Signal Stream::window(size_t i, const Signal& x) {
    const Op& op = engine_->program.ops()[i];
    History& h = states_[i].history;
    const size_t inputs = op.inputs, first = size_t{h.phase} * op.kernel;
    const uint32_t turn = h.turn;
    if (++h.phase == op.dilation) {
        h.phase = 0;
        if (++h.turn == op.kernel) h.turn = 0;
    }
    Signal read;
    if (h.dense) {
        float* const slot = h.dense + (2 * first + turn) * inputs;
        std::memcpy(slot, x.dense, inputs * sizeof(float));
        std::memcpy(slot + op.kernel * inputs, x.dense, inputs * sizeof(float));
        read.dense = slot + inputs;
        return read;
    }
    const size_t newest = first + turn;
    std::memcpy(h.index + newest * inputs, x.events.index, x.events.count * sizeof(uint32_t));
    std::memcpy(h.value + newest * inputs, x.events.value, x.events.count * sizeof(float));
    h.count[newest] = x.events.count;
    uint32_t count = 0;
    for (uint32_t tap = 0, at = turn; tap < op.kernel; ++tap) {
        if (++at == op.kernel) at = 0;
        const size_t slot = first + at;
        for (uint32_t e = 0; e < h.count[slot]; ++e, ++count) {
            h.window_index[count] = h.index[slot * inputs + e] + tap * op.inputs;
            h.window_value[count] = h.value[slot * inputs + e];
        }
    }
    read.events = {h.window_index, h.window_value, count};
    return read;
}

/// y = W x + bias of every stream.
template <class N>
void Stream::product(const Matrix& matrix, const float* bias, Stream* const* streams, N n, const float* const* x,
                     float* const* y) {
    const Kernels& kernels = *streams[0]->engine_->kernels;
    if constexpr (std::is_same_v<N, One>) {
        matrix.matvec(kernels, x[0], bias, y[0], streams[0]->codes_.data());
    } else {
        int8_t* codes[room<N>]{};
        for (size_t s = 0; s < n; ++s) codes[s] = streams[s]->codes_.data();
        matrix.matvec_batch(kernels, n, x, bias, y, codes);
    }
}

template <class N>
void Stream::product(const Matrix& matrix, const float* bias, Stream* const* streams, N n, const Events* x,
                     float* const* y) {
    for (size_t s = 0; s < n; ++s) matrix.matvec(*streams[0]->engine_->kernels, x[s], bias, y[s]);
}

/// y of every stream = W x + bias of op i.
template <class N>
void Stream::input_product(size_t i, const float* bias, Stream* const* streams, N n, const Signal* signals,
                           float* const* y) {
    const Op& op = streams[0]->engine_->program.ops()[i];
    if (op.reads_events) {
        Events lists[room<N>]{};
        for (size_t s = 0; s < n; ++s) {
            lists[s] = signals[s].events;
            count(streams[s]->states_[i].input_reads, lists[s]);
        }
        product(op.input, bias, streams, n, lists, y);
    } else {
        const float* x[room<N>]{};
        for (size_t s = 0; s < n; ++s) x[s] = signals[s].dense;
        product(op.input, bias, streams, n, x, y);
    }
}

/// The memory of one product of op i moves by the columns of what changed. Now and then it is summed anew from what was
/// sent, so that the rounding of many changes is forgotten.
void Stream::accumulate_changes(size_t i, bool hidden, const float* x) {
    const Op& op = engine_->program.ops()[i];
    const Kernels& k = *engine_->kernels;
    OpState& s = states_[i];
    float* const memory = const_cast<float*>(hidden ? s.cell.gh : s.cell.gi);
    float* const sent = hidden ? s.sent_h : s.sent_x;
    const uint32_t units = hidden ? op.outputs : op.inputs;
    DeltaArgs args{units, hidden ? op.delta.hidden : op.delta.input, x, sent, changed_, change_, 0};
    k.cell_delta(args);
    if (*s.age == 0) {
        copy(memory, hidden ? op.bias_hidden : op.bias_input);
        CellArgs all{};  // every value that is not zero
        all.units = units;
        all.gi = all.y = sent;
        all.event_index = changed_;
        all.event_value = change_;
        k.cell_events(all);
        args.count = all.event_count;
    }
    const Events changes{changed_, change_, args.count};
    count(hidden ? s.hidden_reads : s.input_reads, changes);
    (hidden ? op.hidden : op.input).accumulate(k, changes, memory, sums_);
}

/// gh of every stream = W_h y + b_h of op i, of the gates that do not wait for a reset gate.
template <class N>
void Stream::hidden_product(size_t i, Stream* const* streams, N n) {
    const Op& op = streams[0]->engine_->program.ops()[i];
    float* gh[room<N>]{};
    const float* h[room<N>]{};
    Events spoken[room<N>]{};
    for (size_t s = 0; s < n; ++s) {
        const CellArgs& cell = streams[s]->states_[i].cell;
        gh[s] = const_cast<float*>(cell.gh);
        h[s] = cell.h;
        spoken[s] = {cell.event_index, cell.event_value, cell.event_count};
        if (op.delta.hidden >= 0) streams[s]->accumulate_changes(i, true, h[s]);
    }
    if (op.delta.hidden >= 0) return;
    if (op.kind == Op::Kind::egru) {
        for (size_t s = 0; s < n; ++s) count(streams[s]->states_[i].hidden_reads, spoken[s]);
        product(op.hidden, op.bias_hidden.data(), streams, n, spoken, gh);
    } else {
        product(op.hidden, op.bias_hidden.data(), streams, n, h, gh);
    }
}

template <class N>
void Stream::recurrent(size_t i, Stream* const* streams, N n, const int64_t* token, Signal* signals) {
    const Op& op = streams[0]->engine_->program.ops()[i];
    const Kernels& k = *streams[0]->engine_->kernels;
    const uint32_t units = pad(op.outputs);
    const bool egru = op.kind == Op::Kind::egru;
    const auto cell = [&](size_t s) -> CellArgs& { return streams[s]->states_[i].cell; };
    float *gi[room<N>]{}, *gh[room<N>]{};
    const float* h[room<N>]{};
    Events spoken[room<N>]{};
    for (size_t s = 0; s < n; ++s) {
        gi[s] = const_cast<float*>(cell(s).gi);
        gh[s] = const_cast<float*>(cell(s).gh);
        h[s] = cell(s).h;
        spoken[s] = {cell(s).event_index, cell(s).event_value, cell(s).event_count};
    }

    if (op.sends_changes())
        for (size_t s = 0; s < n; ++s) {
            float& age = *streams[s]->states_[i].age;
            age = age + 1 < kDeltaRefresh ? age + 1 : 0;
        }

    // The folded table holds W_i x + b_i of every token; reading it in place saves the copy.
    if (op.table.size()) {
        for (size_t s = 0; s < n; ++s) cell(s).gi = op.table.data() + static_cast<size_t>(token[s]) * op.gates * units;
    } else if (op.delta.input >= 0) {
        for (size_t s = 0; s < n; ++s) streams[s]->accumulate_changes(i, false, signals[s].dense);
    } else {
        input_product(i, op.bias_input.data(), streams, n, signals, gi);
    }

    Companion* const companion = streams[0]->companion_;
    if (!companion || companion->take(i)) hidden_product(i, streams, n);
    if (!op.reset_after) {
        const float* scaled[room<N>]{};
        float* gh_n[room<N>]{};
        const float* const bias_n = op.bias_hidden.data() + size_t{2} * units;
        for (size_t s = 0; s < n; ++s) {
            k.reset_gate(cell(s));
            float* const to = streams[s]->states_[i].scaled;
            const float* const r = cell(s).r;
            if (egru)
                for (uint32_t e = 0; e < spoken[s].count; ++e) to[e] = r[spoken[s].index[e]] * spoken[s].value[e];
            else
                for (uint32_t j = 0; j < units; ++j) to[j] = r[j] * h[s][j];
            spoken[s].value = scaled[s] = to;
            gh_n[s] = gh[s] + size_t{2} * units;
        }
        if (egru)
            product(op.hidden_n, bias_n, streams, n, spoken, gh_n);
        else
            product(op.hidden_n, bias_n, streams, n, scaled, gh_n);
    }

    const auto update = egru                        ? k.cell_egru
                        : op.kind == Op::Kind::lstm ? k.cell_lstm
                        : op.kind == Op::Kind::rnn  ? k.cell_rnn
                                                    : k.cell_gru;
    for (size_t s = 0; s < n; ++s) {
        update(cell(s));
        cell(s).gi = gi[s];
        signals[s].dense = egru ? (op.emits_events ? cell(s).y : cell(s).u) : cell(s).h;
    }
}

/// A logit for each word of cluster i, of every stream: `read` is what the linear op of its log-softmax read.
template <class N>
void Stream::words_of(size_t i, Stream* const* streams, N n, const Signal* read) {
    const Op& op = streams[0]->engine_->program.ops()[i];
    float *projected[room<N>]{}, *words[room<N>]{};
    const float* x[room<N>]{};
    for (size_t s = 0; s < n; ++s) {
        x[s] = projected[s] = streams[s]->projected_;
        words[s] = streams[s]->words_;
        ++streams[s]->states_[i].asked;
    }
    input_product(i, nullptr, streams, n, read, projected);
    product(op.hidden, op.bias_hidden.data(), streams, n, x, words);
}

template <class N>
void Stream::play(size_t first, size_t last, Stream* const* streams, N n, const int64_t* token, Signal* signals,
                  Signal* read, uint8_t* trace) {
    const std::vector<Op>& ops = streams[0]->engine_->program.ops();
    const Kernels& k = *streams[0]->engine_->kernels;
    for (size_t i = first; i < last; ++i) {
        const Op& op = ops[i];
        switch (op.kind) {
            case Op::Kind::embedding:
                if (op.folded) break;
                for (size_t s = 0; s < n; ++s)
                    signals[s].dense = op.table.data() + static_cast<size_t>(token[s]) * pad(op.outputs);
                break;
            case Op::Kind::linear:
            case Op::Kind::conv1d: {
                float* y[room<N>]{};
                for (size_t s = 0; s < n; ++s) {
                    if (op.kind == Op::Kind::conv1d)
                        signals[s] = streams[s]->window(i, signals[s]);
                    else
                        read[s] = signals[s];
                    y[s] = streams[s]->states_[i].output;
                }
                input_product(i, op.bias_input.data(), streams, n, signals, y);
                for (size_t s = 0; s < n; ++s) signals[s].dense = y[s];
                break;
            }
            case Op::Kind::cluster:
                words_of(i, streams, n, read);
                for (size_t s = 0; s < n; ++s) {
                    const uint32_t words = op.words();
                    const float* const given = streams[s]->words_;
                    float* const y = streams[s]->states_[i].output;
                    NormArgs args{words, 0, nullptr, nullptr, streams[s]->words_};
                    k.cell_log_softmax(args);
                    const float cluster = y[op.at];
                    std::memmove(y + op.at + words, y + op.at + 1, (op.inputs - op.at - 1) * sizeof(float));
                    for (uint32_t j = 0; j < words; ++j) y[op.at + j] = cluster + given[j];
                    signals[s].dense = y;
                }
                break;
            case Op::Kind::relu:
            case Op::Kind::events:
            case Op::Kind::kwta:
            case Op::Kind::log_softmax:
            case Op::Kind::top_k:
            case Op::Kind::layer_norm:
                for (size_t s = 0; s < n; ++s)
                    signals[s].dense = pointwise(k, op, streams[s]->states_[i], signals[s].dense);
                break;
            default:
                recurrent(i, streams, n, token, signals);
        }
        if (!op.speaks()) continue;
        for (size_t s = 0; s < n; ++s) {
            OpState& state = streams[s]->states_[i];
            signals[s].events = {state.cell.event_index, state.cell.event_value, state.cell.event_count};
            count(state.events, signals[s].events);
        }
        if (!trace) continue;  // of one stream
        const Events& events = signals[0].events;
        uint8_t* const spoke = trace + streams[0]->states_[i].trace_at;
        std::memset(spoke, 0, op.outputs);
        for (uint32_t e = 0; e < events.count; ++e) spoke[events.index[e]] = 1;
    }
}

/// What op `last` - 1 hands on in one step; with it the step is over for the layers.
Stream::Signal Stream::play_one(size_t last, int64_t token, const float* x, Signal* read, uint8_t* trace, bool shared) {
    Stream* const self = this;
    Companion* const companion = engine_->companion.get();
    if (shared && companion && companion->offer(*this)) companion_ = companion;
    Signal signal;
    signal.dense = x;
    play(0, last, &self, One{}, &token, &signal, read, trace);
    if (companion_) companion_->end();
    companion_ = nullptr;
    ++steps_;
    return signal;
}

void Stream::step(int64_t token, const float* x, float* out, uint8_t* trace, bool shared) {
    const FlushDenormals flush;
    const Program& program = engine_->program;
    Signal read;
    const Signal signal = play_one(program.ops().size(), token, x, &read, trace, shared);
    std::memcpy(out, signal.dense, program.outputs() * sizeof(float));
}

float Stream::score(int64_t token, const float* x, uint32_t target) {
    const FlushDenormals flush;
    const std::vector<Op>& ops = engine_->program.ops();
    const Kernels& k = *engine_->kernels;
    const size_t clusters = engine_->program.before_clusters(ops.size());
    const size_t head = clusters - (ops[clusters - 1].kind == Op::Kind::log_softmax);
    Signal read;
    const float* const y = play_one(head, token, x, &read, nullptr, true).dense;
    LogSumArgs all{ops[clusters - 1].outputs, y, 0, 0};
    k.cell_log_sum(all);
    const auto first_step = [&](uint32_t j) { return y[j] - all.largest - all.log_sum; };
    uint32_t grown = 0;  // how far the clusters before have moved what lies behind them
    for (size_t i = clusters; i < ops.size() && target >= ops[i].at; ++i) {
        const Op& op = ops[i];
        if (target - op.at < op.words()) {
            Stream* const self = this;
            words_of(i, &self, One{}, &read);
            LogSumArgs own{op.words(), words_, 0, 0};
            k.cell_log_sum(own);
            return first_step(op.at - grown) + (words_[target - op.at] - own.largest - own.log_sum);
        }
        grown += op.words() - 1;
    }
    return first_step(target - grown);
}

void Stream::score(size_t steps, const int64_t* token, const float* x, const int64_t* target, float* out) {
    const uint32_t inputs = engine_->program.inputs();
    for (size_t t = 0; t < steps; ++t)
        out[t] = score(token ? token[t] : 0, x ? x + t * inputs : nullptr, static_cast<uint32_t>(target[t]));
}

void Stream::step_group(Stream* const* streams, size_t n, const int64_t* token, const float* const* x,
                        float* const* out) {
    const FlushDenormals flush;
    const Program& program = streams[0]->engine_->program;
    Signal signals[kBatch], read[kBatch];
    for (size_t s = 0; s < n; ++s) signals[s].dense = x[s];
    play(0, program.ops().size(), streams, n, token, signals, read, nullptr);
    for (size_t s = 0; s < n; ++s) {
        std::memcpy(out[s], signals[s].dense, program.outputs() * sizeof(float));
        ++streams[s]->steps_;
    }
}

void Stream::run(size_t steps, const int64_t* token, const float* x, float* out, uint8_t* trace) {
    const Program& program = engine_->program;
    if (program.whole_sequences()) return run_whole(steps, token, x, out, trace);
    for (size_t t = 0; t < steps; ++t)
        step(token ? token[t] : 0, x ? x + t * program.inputs() : nullptr, out + t * program.outputs(),
             trace ? trace + t * trace_width_ : nullptr);
}

class Stream::Sequence {
  public:
    /// Room for `steps` steps of at most `dense` values or `events` events.
    Sequence(size_t steps, size_t dense, size_t events)
        : value_(checked(steps, std::max(dense, events))), index_(checked(steps, events)), count_(events ? steps : 0) {}
    /// From now on each step holds `width` values, or as many events.
    void start(size_t width, bool events) {
        width_ = width;
        events_ = events;
        if (events) std::memset(count_.data(), 0, count_.size() * sizeof(uint32_t));
    }
    /// Adds what an op of `units` units hands on to step t, at values `first` on.
    void add(size_t t, uint32_t first, uint32_t units, const Signal& signal) {
        if (!events_) {
            std::memcpy(value_.data() + t * width_ + first, signal.dense, units * sizeof(float));
            return;
        }
        for (uint32_t e = 0; e < signal.events.count; ++e) {
            const size_t at = t * width_ + count_[t]++;
            index_[at] = first + signal.events.index[e];
            value_[at] = signal.events.value[e];
        }
    }
    Signal at(size_t t) const {
        Signal signal;
        if (events_)
            signal.events = {index_.data() + t * width_, value_.data() + t * width_, count_[t]};
        else
            signal.dense = value_.data() + t * width_;
        return signal;
    }

  private:
    static size_t checked(size_t steps, size_t width) {
        if (width && steps > SIZE_MAX / width) throw std::bad_alloc();
        return steps * width;
    }
    Buffer<float> value_;
    Buffer<uint32_t> index_, count_;
    size_t width_ = 0;
    bool events_ = false;
};

/// Layer by layer: stretches of ops that read forwards are played step by step, and between them both directions of a
/// layer, each over all steps.
void Stream::run_whole(size_t steps, const int64_t* token, const float* x, float* out, uint8_t* trace) {
    const Program& program = engine_->program;
    const std::vector<Op>& ops = program.ops();
    // What op i reads is kept where it or the one after it begins a stretch: of all these places the widest.
    const auto two_ways = [&](size_t i) { return i + 1 < ops.size() && ops[i + 1].reverse; };
    const auto hands_on_events = [&](size_t i) { return i < ops.size() && ops[i].reads_events; };
    size_t dense = 0, events = 0;
    for (size_t i = 1; i <= ops.size(); ++i)
        if (ops[i - 1].reverse || two_ways(i)) {
            const size_t width = ops[i - 1].outputs * (ops[i - 1].reverse ? size_t{2} : size_t{1});
            (hands_on_events(i) ? events : dense) = std::max(hands_on_events(i) ? events : dense, width);
        }
    Sequence first(steps, dense, events), second(steps, dense, events);
    Sequence *read = &first, *write = &second;
    bool from_x = true;
    const FlushDenormals flush;
    Stream* const self = this;
    const auto play_step = [&](size_t from, size_t to, size_t t) {
        Signal signal = from_x ? Signal{} : read->at(t), of_linear;
        if (from_x) signal.dense = x ? x + t * program.inputs() : nullptr;
        play(from, to, &self, One{}, token ? token + t : nullptr, &signal, &of_linear,
             trace ? trace + t * trace_width_ : nullptr);
        return signal;
    };
    reset();
    for (size_t i = 0;;) {
        size_t end = i;
        while (end < ops.size() && !two_ways(end)) ++end;
        if (end == ops.size()) {
            for (size_t t = 0; t < steps; ++t)
                std::memcpy(out + t * program.outputs(), play_step(i, end, t).dense, program.outputs() * sizeof(float));
            break;
        }
        if (end > i) {
            const uint32_t width = ops[end - 1].outputs * (ops[end - 1].reverse ? 2 : 1);
            write->start(width, ops[end].reads_events);
            for (size_t t = 0; t < steps; ++t) write->add(t, 0, width, play_step(i, end, t));
            std::swap(read, write);
            from_x = false;
        }
        const uint32_t units = ops[end].outputs;
        write->start(size_t{2} * units, hands_on_events(end + 2));
        for (size_t t = 0; t < steps; ++t) write->add(t, 0, units, play_step(end, end + 1, t));
        for (size_t t = steps; t-- > 0;) write->add(t, units, units, play_step(end + 1, end + 2, t));
        std::swap(read, write);
        from_x = false;
        i = end + 2;
    }
    steps_ += steps;
}

void Engine::set_threads(size_t threads) const {
    companion.reset();
    std::vector<size_t> ops = Companion::worthwhile(program);
    if (threads > 1 && !ops.empty()) companion.reset(new Companion(*this, std::move(ops)));
}

void Engine::Delete::operator()(Companion* companion) const {
    if (companion->process_ == getpid()) delete companion;  // as of a Crew
}

std::vector<size_t> Companion::worthwhile(const Program& program) {
    // About two microseconds of multiplications, where a tenth of the units speaks. A folded first layer has no product
    // of its input to make meanwhile. A sparse memory's changes share the stream's room with those of the input.
    constexpr size_t kWorth = 20000;
    std::vector<size_t> found;
    for (size_t i = 0; i < program.ops().size(); ++i) {
        const Op& op = program.ops()[i];
        if (!op.recurrent() || op.table.size() || op.delta.hidden >= 0 || op.hidden.code_bytes()) continue;
        if (op.hidden.elements() / (op.kind == Op::Kind::egru ? 10 : 1) >= kWorth) found.push_back(i);
    }
    return found;
}

Companion::Companion(const Engine& engine, std::vector<size_t> ops)
    : ops_(std::move(ops)),
      taken_(engine.program.ops().size()),
      made_(engine.program.ops().size()),
      process_(getpid()),
      thread_([this] { serve(); }) {}

Companion::~Companion() {
    stop_ = true;
    {
        const std::lock_guard<std::mutex> lock(mutex_);  // it waits, or has not looked yet
    }
    wake_.notify_one();
    thread_.join();
}

bool Companion::offer(Stream& stream) {
    const auto now = std::chrono::steady_clock::now();
    const bool again = now - last_.exchange(now, std::memory_order_relaxed) < kPatience;
    uint32_t state = listening;
    if (!state_.compare_exchange_strong(state, claimed, std::memory_order_acquire)) {
        if (state != asleep || !again || process_ != getpid()) return false;
        if (!state_.compare_exchange_strong(state, listening, std::memory_order_acq_rel)) return false;
        {
            const std::lock_guard<std::mutex> lock(mutex_);
        }
        wake_.notify_one();
        return false;  // the next step finds it awake
    }
    stream_ = &stream;
    ++turn_;
    state_.store(offered, std::memory_order_release);
    return true;
}

bool Companion::take(size_t op) {
    if (taken_[op].exchange(turn_, std::memory_order_acq_rel) != turn_) return true;
    for (uint32_t spins = 0; made_[op].load(std::memory_order_acquire) != turn_; ++spins)
        if (spins > 1u << 14) std::this_thread::yield();  // it may have lost its processor
    return false;
}

void Companion::end() {
    uint32_t state = offered;
    if (state_.compare_exchange_strong(state, listening, std::memory_order_acq_rel)) return;  // it never came
    while (state_.load(std::memory_order_acquire) == working) std::this_thread::yield();      // about to leave
}

void Companion::serve() {
    const FlushDenormals flush;  // as in a step
    const auto awake = [this] { return stop_ || state_.load(std::memory_order_acquire) != asleep; };
    auto since = std::chrono::steady_clock::now();
    for (uint32_t spins = 0; !stop_; ++spins) {
        uint32_t state = offered;
        if (state_.compare_exchange_weak(state, working, std::memory_order_acquire)) {
            for (const size_t op : ops_) {
                if (taken_[op].exchange(turn_, std::memory_order_acq_rel) == turn_) continue;
                Stream::hidden_product(op, &stream_, One{});
                made_[op].store(turn_, std::memory_order_release);
            }
            state_.store(listening, std::memory_order_release);
            since = std::chrono::steady_clock::now();
        } else if (spins % 64 == 0 && std::chrono::steady_clock::now() - since > kPatience) {
            state = listening;
            if (!state_.compare_exchange_strong(state, asleep, std::memory_order_acq_rel) && state != asleep) continue;
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, awake);
            since = std::chrono::steady_clock::now();
        } else {
            relax();
        }
    }
}

/// Looks at `reached` for as long as a batch may be near, unless `never`; waking a thread takes longer than small
/// batches.
template <class Reached>
void spin(bool never, const Reached& reached) {
    const auto start = std::chrono::steady_clock::now();
    for (uint32_t spins = 0; !never && !reached(); ++spins) {
        relax();
        if (spins % 64 == 63 && std::chrono::steady_clock::now() - start > std::chrono::microseconds(300)) return;
    }
}

Crew::Crew(size_t threads) : process_(getpid()), spins_(threads <= std::thread::hardware_concurrency()) {
    try {
        while (threads_.size() + 1 < threads) threads_.emplace_back([this] { serve(); });
    } catch (...) {  // the system gives no more of them
        dismiss();
        throw;
    }
}

Crew::~Crew() { dismiss(); }

void Crew::Delete::operator()(Crew* crew) const {
    if (crew->process_ == getpid()) delete crew;  // in a child of fork its threads do not live, and none can be joined
}

void Crew::dismiss() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

void Crew::work_off() {
    for (size_t part; (part = next_.fetch_add(1, std::memory_order_relaxed)) < parts_;) work_(context_, part);
}

void Crew::serve() {
    uint64_t seen = 0;
    const auto called = [&] { return stop_ || round_ != seen; };
    for (;;) {
        spin(!spins_, called);
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, called);
        if (stop_) return;
        seen = round_;
        lock.unlock();
        work_off();
        lock.lock();
        if (--busy_ == 0) done_.notify_one();
    }
}

void Crew::run(size_t parts, Work work, const void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn || threads_.empty() || parts < 2 || process_ != getpid()) {
        for (size_t part = 0; part < parts; ++part) work(context, part);
        return;
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        parts_ = parts;
        work_ = work;
        context_ = context;
        next_.store(0, std::memory_order_relaxed);
        busy_ = threads_.size();
        ++round_;
    }
    wake_.notify_all();
    work_off();
    spin(!spins_, [&] { return busy_ == 0; });
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
}

}  // namespace sparsefold
