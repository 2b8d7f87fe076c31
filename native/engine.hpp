// Playing a program: one Stream is one state with its own counters; many streams share one Program. `step` allocates
// nothing and counts integers only (events emitted, columns read); src/sparsefold/cost.py alone multiplies.
#pragma once
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.hpp"
#include "program.hpp"

namespace sparsefold {

class Companion;

struct Engine {
    Engine(Program program, const std::string& isa, uint64_t fold_limit);
    Program program;
    std::string isa;
    const Kernels* kernels;

    /// A thread of its own for the steps of single streams where `threads` is 2 or more and it can pay. Not while one
    /// is played.
    void set_threads(size_t threads) const;
    struct Delete {
        void operator()(Companion* companion) const;
    };
    mutable std::unique_ptr<Companion, Delete> companion;  // no bit of any output depends on it
};

/// The last inputs of a convolution: a ring of `kernel` slots for each of `dilation` phases, for its taps lie in one
/// phase.
struct History {
    float* dense = nullptr;  // (dilation, 2, kernel, inputs), every input twice: what the product reads is one piece
    // Where it reads events:
    uint32_t *index = nullptr, *count = nullptr;  // (dilation, kernel, inputs), (dilation, kernel)
    float* value = nullptr;                       // (dilation, kernel, inputs)
    uint32_t* window_index = nullptr;             // (kernel, inputs) columns of the product
    float* window_value = nullptr;
    uint32_t phase = 0, turn = 0;  // of the next input
};

/// State and counters of one op of one stream; pointers into the stream's arena.
struct OpState {
    CellArgs cell{};
    float* scaled = nullptr;                     // r * y or r * h, when the reset gate acts before the product
    float* output = nullptr;                     // linear, layer norm; one of a log-softmax and the clusters behind it
    float *sent_x = nullptr, *sent_h = nullptr;  // of a delta network; its memories are cell.gi and cell.gh
    float* age = nullptr;                        // steps since they were summed anew
    History history;
    size_t trace_at = 0;                 // of its units in a trace
    std::vector<uint64_t> events;        // EGRU, ReLU: per unit, events emitted
    std::vector<uint64_t> input_reads;   // per input column, how often its event was read; empty for dense x
    std::vector<uint64_t> hidden_reads;  // the same for the recurrent matrix; empty for dense h
    uint64_t asked = 0;                  // cluster: how often its words were computed
};

/// Some of what a stream carries: `parts` parts of `units` values, each padded to whole vectors.
struct Carried {
    float* at = nullptr;
    size_t units = 0, parts = 1;
    size_t size() const { return units * parts; }
    void read(float* to) const {
        for (size_t p = 0; p < parts; ++p) std::memcpy(to + p * units, part(p), units * sizeof(float));
    }
    void write(const float* from) const {
        for (size_t p = 0; p < parts; ++p) std::memcpy(part(p), from + p * units, units * sizeof(float));
    }

  private:
    float* part(size_t p) const { return at + p * pad(static_cast<uint32_t>(units)); }
};

class Stream {
  public:
    explicit Stream(std::shared_ptr<const Engine> engine);

    /// One step, of a program that does not play whole sequences. Exactly one of `token` (in front of an embedding) and
    /// `x` (program.inputs() floats) is read; `out` receives program.outputs() floats. The caller has checked the
    /// token. `trace`, if given, receives one byte per unit of every EGRU and ReLU, in order: 1 where it emitted.
    /// `shared`: the engine's companion may help.
    void step(int64_t token, const float* x, float* out, uint8_t* trace = nullptr, bool shared = true);

    /// `steps` steps: token (steps), or x (steps, inputs); out (steps, outputs), trace (steps, trace_width) or null. A
    /// program that plays whole sequences starts from zero at each call, and first of all takes memory for what two of
    /// its layers hand on at all steps; others take none.
    void run(size_t steps, const int64_t* token, const float* x, float* out, uint8_t* trace = nullptr);

    /// One step, of a program that `scores()`: the log-probability of output `target`, which the caller has checked; to
    /// the bit that of `step` where the last op gives log-probabilities. Of clusters at the end only the one that holds
    /// the target is computed.
    float score(int64_t token, const float* x, uint32_t target);
    /// `steps` of them; target and out (steps).
    void score(size_t steps, const int64_t* token, const float* x, const int64_t* target, float* out);

    /// One step of each of `n` different streams of one engine, at most kBatch, as `step` would play it, to the bit:
    /// op by op, so that they share what the caches hold of its weights.
    static void step_group(Stream* const* streams, size_t n, const int64_t* token, const float* const* x,
                           float* const* out);

    void reset();  // state to zero; counters stay
    void reset_counters();
    void set_emitted(size_t op, const float* y);  // y of step t-1; what is not zero is an event
    /// Inputs that convolution `op` remembers, (history, inputs), the oldest first; what is not zero is an event.
    void history(size_t op, float* x) const;
    void set_history(size_t op, const float* x);
    size_t history_size(size_t op) const;  // 0 of any other op

    /// sent_x, memory_x, sent_h, memory_h or age of an op that sends changes; null where it has none.
    Carried changes(size_t op, const std::string& name);

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
    /// What a layer hands on at every step of a sequence: dense values, or lists of events.
    class Sequence;
    void run_whole(size_t steps, const int64_t* token, const float* x, float* out, uint8_t* trace);
    // Ops [first, last) of `n` streams: a compile-time 1 for `step`, so that a step and a batch are one text. `signals`
    // are what the first of them reads, and then what the last one hands on; `read` receives what the last linear op
    // read.
    template <class N>
    static void play(size_t first, size_t last, Stream* const* streams, N n, const int64_t* token, Signal* signals,
                     Signal* read, uint8_t* trace);
    Signal play_one(size_t last, int64_t token, const float* x, Signal* read, uint8_t* trace, bool shared);
    template <class N>
    static void words_of(size_t i, Stream* const* streams, N n, const Signal* read);
    Signal window(size_t i, const Signal& x);
    template <class N>
    static void recurrent(size_t i, Stream* const* streams, N n, const int64_t* token, Signal* signals);
    template <class N>
    static void hidden_product(size_t i, Stream* const* streams, N n);
    friend class Companion;
    void accumulate_changes(size_t i, bool hidden, const float* x);
    template <class N>
    static void product(const Matrix& matrix, const float* bias, Stream* const* streams, N n, const float* const* x,
                        float* const* y);
    template <class N>
    static void product(const Matrix& matrix, const float* bias, Stream* const* streams, N n, const Events* x,
                        float* const* y);
    template <class N>
    static void input_product(size_t i, const float* bias, Stream* const* streams, N n, const Signal* signals,
                              float* const* y);
    std::shared_ptr<const Engine> engine_;
    Buffer<float> arena_;
    std::vector<OpState> states_;
    std::vector<int8_t> codes_;  // room for a dense x in int8
    // Room for the changes of one product, and for its sums.
    uint32_t* changed_ = nullptr;
    float *change_ = nullptr, *sums_ = nullptr;
    float *projected_ = nullptr, *words_ = nullptr;  // of the cluster that is played: P x, and a logit for each word
    uint64_t steps_ = 0;
    size_t trace_width_ = 0;
    Companion* companion_ = nullptr;  // where it helps with the step that is played
};

/// A stream for one thread; false when another has it.
class Claim {
  public:
    explicit Claim(Stream& stream)
        : stream_(stream), claimed_(!stream.busy.exchange(true, std::memory_order_acquire)) {}
    ~Claim() {
        if (claimed_) stream_.busy.store(false, std::memory_order_release);
    }
    Claim(const Claim&) = delete;
    explicit operator bool() const { return claimed_; }

  private:
    Stream& stream_;
    bool claimed_;
};

/// All streams of a batch for one thread, or none of them. `refused()` is the first that another has, or that the
/// batch names twice; `n` when all are claimed.
template <class Streams>
class Claims {
  public:
    Claims(const Streams& stream, size_t n) : stream_(stream), n_(n) {
        while (claimed_ < n && !stream(claimed_).busy.exchange(true, std::memory_order_acquire)) ++claimed_;
        refused_ = claimed_;
        if (claimed_ < n) release();
    }
    ~Claims() { release(); }
    Claims(const Claims&) = delete;
    explicit operator bool() const { return refused_ == n_; }
    size_t refused() const { return refused_; }

  private:
    void release() {
        while (claimed_) stream_(--claimed_).busy.store(false, std::memory_order_release);
    }
    const Streams& stream_;
    size_t n_, claimed_ = 0, refused_ = 0;
};

/// A second thread for the steps of one stream. Recurrent products read only what the step before has left, so that
/// they are made layer by layer while the caller makes the products of what comes in; each by whoever takes it first.
/// Between steps it spins for kPatience, then it sleeps until two steps follow one another within that time. Who finds
/// it asleep or with another stream plays alone, as in a child of fork.
class Companion {
  public:
    /// Which ops of a program are worth a second thread: none is no Companion.
    static std::vector<size_t> worthwhile(const Program& program);
    Companion(const Engine& engine, std::vector<size_t> ops);
    ~Companion();
    Companion(const Companion&) = delete;

    bool offer(Stream& stream);  // the recurrent products of its next step; false: nobody listens
    bool take(size_t op);        // true: the caller makes it; false: it is made, or was never offered
    void end();                  // of a step that was offered

  private:
    static constexpr std::chrono::microseconds kPatience{300};
    enum State : uint32_t { asleep, listening, claimed, offered, working };
    void serve();
    friend struct Engine;
    const std::vector<size_t> ops_;
    std::vector<std::atomic<uint32_t>> taken_, made_;  // by op: the last turn in which
    std::atomic<uint32_t> state_{asleep};
    std::atomic<bool> stop_{false};
    uint32_t turn_ = 0;
    Stream* stream_ = nullptr;
    std::atomic<std::chrono::steady_clock::time_point> last_{};
    const int process_;
    std::mutex mutex_;
    std::condition_variable wake_;
    std::thread thread_;
};

/// The threads that share a batch: the caller's and `threads - 1` of its own, which spin for a moment and then sleep in
/// between. One batch at a time has their help; who comes meanwhile, or in a child of fork, plays alone. No bit depends
/// on it.
class Crew {
  public:
    static constexpr size_t kMost = 256;  // a wrong number must not fill the machine
    explicit Crew(size_t threads);        // at least 1, at most kMost
    ~Crew();
    Crew(const Crew&) = delete;
    struct Delete {
        void operator()(Crew* crew) const;
    };
    using Pointer = std::unique_ptr<Crew, Delete>;
    size_t threads() const { return threads_.size() + 1; }

    /// One step of each of `n` different streams of one engine. `stream(s)` is stream s; token (n), x (n, inputs),
    /// out (n, outputs).
    template <class Streams>
    void step_batch(const Streams& stream, size_t n, const int64_t* token, const float* x, float* out) {
        if (n == 0) return;
        const size_t share = std::min(kBatch, (n + threads() - 1) / threads());
        const auto play = [&](size_t part) {
            const Program& program = stream(0).engine().program;
            Stream* streams[kBatch];
            const float* xs[kBatch];
            float* outs[kBatch];
            const size_t first = part * share, size = std::min(share, n - first);
            for (size_t s = 0; s < size; ++s) {
                streams[s] = &stream(first + s);
                xs[s] = x ? x + (first + s) * program.inputs() : nullptr;
                outs[s] = out + (first + s) * program.outputs();
            }
            if (size == 1) return streams[0]->step(token ? token[first] : 0, xs[0], outs[0], nullptr, n == 1);
            Stream::step_group(streams, size, token ? token + first : nullptr, xs, outs);
        };
        run((n + share - 1) / share,
            [](const void* context, size_t part) { (*static_cast<decltype(play)*>(context))(part); }, &play);
    }

  private:
    using Work = void (*)(const void* context, size_t part);
    void run(size_t parts, Work work, const void* context);
    void serve();
    void work_off();
    void dismiss();
    std::vector<std::thread> threads_;
    const int process_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    // Changed under mutex_; read without it by who spins for a moment before sleeping, where every thread has a
    // processor.
    const bool spins_;
    std::atomic<bool> stop_{false};
    std::atomic<uint64_t> round_{0};
    std::atomic<size_t> busy_{0};
    // The batch; written under mutex_ while all threads sleep.
    size_t parts_ = 0;
    Work work_ = nullptr;
    const void* context_ = nullptr;
    std::atomic<size_t> next_{0};
};

}  // namespace sparsefold
