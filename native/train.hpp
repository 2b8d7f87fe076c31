// Training kernels at work: threads that walk through a sequence together, and the room that the loops of
// sequence.inl.hpp need. Kernels of no engine: nothing here is kept from call to call.
#pragma once
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "dispatch.hpp"
#include "sequences.hpp"

namespace sparsefold {

/// The caller's thread and `size - 1` others: those of the OpenMP runtime that is in this process already (torch's), or
/// threads of its own, which sleep in between. The runtime's spin for milliseconds after each product of torch's, and
/// others would share their processors. One call at a time has their help; who comes meanwhile, or in a child of fork,
/// works alone. No bit depends on it.
class Team {
  public:
    static constexpr size_t kMost = 256;              // a wrong number must not fill the machine
    explicit Team(size_t size, bool runtime = true);  // 1 to kMost; whether a runtime's threads may help
    ~Team();
    Team(const Team&) = delete;
    size_t size() const { return size_; }
    bool borrows() const { return runtime_.parallel != nullptr; }

    /// f(const Member&), by `most` members at most, all at the same time.
    template <class F>
    void run(size_t most, const F& f) {
        dispatch(most, [](const void* context, const Member& m) { (*static_cast<const F*>(context))(m); }, &f);
    }
    struct Delete {
        void operator()(Team* team) const;
    };

  private:
    using Work = void (*)(const void* context, const Member& member);
    struct Runtime {  // functions of GNU's OpenMP, all null where it is not loaded
        void (*parallel)(void (*work)(void*), void* context, unsigned threads, unsigned flags) = nullptr;
        int (*number)() = nullptr;
        int (*members)() = nullptr;
        Runtime();
    };
    void dispatch(size_t most, Work work, const void* context);
    void serve(uint32_t number);
    void meet();
    static void (*meeting())(void* team);
    void dismiss();
    Runtime runtime_;
    std::vector<std::thread> threads_;
    const size_t size_;
    const int process_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    bool stop_ = false;
    uint64_t round_ = 0;
    size_t busy_ = 0;
    // The call; written while no thread is at work, where they are our own under mutex_.
    std::atomic<uint32_t> members_{0};
    Work work_ = nullptr;
    const void* context_ = nullptr;
    std::atomic<uint32_t> arrived_{0};
    std::atomic<uint32_t> meetings_{0};
};

/// The table that holds the sequences of `isa` (as for kernels()).
const Sequences& sequences(const std::string& isa, std::string* chosen = nullptr);

/// Large pages for fresh memory, where the system has them.
void advise_large_pages(void* p, size_t bytes);

/// Elements of a transposed weight.
inline size_t transposed_size(uint32_t gates, uint32_t units, uint32_t cols) {
    return static_cast<size_t>(gates) * pad(units) * cols;
}

/// Uninitialised values, whole vectors of which never cross a cache line.
template <class Real>
class Room {
  public:
    explicit Room(size_t n = 0) : data_(n ? static_cast<Real*>(::operator new(n * sizeof(Real), kLine)) : nullptr) {}
    Real* get() const { return data_.get(); }

  private:
    static constexpr std::align_val_t kLine{64};
    struct Delete {
        void operator()(Real* p) const { ::operator delete(p, kLine); }
    };
    std::unique_ptr<Real, Delete> data_;
};

/// Which blocks of a weight are live, and where they lie in BlockWeight: start and row, both empty if not packed.
struct BlockPattern {
    uint32_t gates, units, cols, strips;
    std::vector<uint64_t> live;  // (groups * gates, segments of cols)
    std::vector<uint32_t> start, row, row_start, col;
};

/// A weight by its live blocks. Never changed once made; weights with the same blocks share the pattern.
template <class Real>
struct Blocks {
    std::shared_ptr<const BlockPattern> pattern;  // null: nobody looked closely, far too many are live
    Room<Real> values, by_row;
    bool packed() const { return pattern && !pattern->start.empty(); }
    double share() const;  // of blocks that are live; 1 where nobody looked
    BlockWeight<Real> view() const;
};

/// The blocks of a weight (gates * units, cols), packed where at most the share `most` is live and all is finite.
/// `kept` as in PackBlocksArgs, or null; `previous`, or null: what it may share the pattern with.
template <class Real>
Blocks<Real> pack_blocks(Team& team, const SequenceKernels<Real>& k, const Real* weight, uint32_t gates, uint32_t units,
                         uint32_t cols, const uint64_t* kept, double most, const Blocks<Real>* previous);

/// Bits of the blocks of a mask (gates * units, cols) with any byte that is not zero, as BlockPattern::live.
std::vector<uint64_t> blocks_of(const uint8_t* mask, uint32_t gates, uint32_t units, uint32_t cols);

/// Fills args.values; true where a weight is not finite.
template <class Real>
bool transpose(Team& team, const SequenceKernels<Real>& k, TransposeArgs<Real> args);

/// args.out = bias + W x for what is not zero of x (rows, cols), or for all of it where args.dense is given. What x
/// holds and the room of args are filled in here.
template <class Real>
void input_product(Team& team, const SequenceKernels<Real>& k, InputProductArgs<Real> args, const Real* x,
                   uint32_t rows, uint32_t cols);

/// The room of args is filled in here.
template <class Real>
void input_gradient(Team& team, const SequenceKernels<Real>& k, InputGradientArgs<Real> args);

/// The pointers of room are filled in here.
template <class Real>
void egru_forward(Team& team, const SequenceKernels<Real>& k, EgruForwardArgs<Real> args);
template <class Real>
void egru_backward(Team& team, const SequenceKernels<Real>& k, EgruBackwardArgs<Real> args);

/// args.out = sum over rows of g x^T, x as `from` says it. What x holds and the room of args are filled in here.
template <class Real>
void outer(Team& team, const SequenceKernels<Real>& k, OuterArgs<Real> args, SiftArgs<Real> from, uint32_t rows,
           uint32_t cols);

/// The pointers of room are filled in here.
template <class Real>
void gated_forward(Team& team, const SequenceKernels<Real>& k, GatedForwardArgs<Real> args);
template <class Real>
void gated_backward(Team& team, const SequenceKernels<Real>& k, GatedBackwardArgs<Real> args);
/// args.out, zeros, gets the outer product in the live blocks of `pattern`, whose lists and room are filled in here.
template <class Real>
void outer_blocks(Team& team, const SequenceKernels<Real>& k, OuterBlocksArgs<Real> args, const BlockPattern& pattern);

/// Elements that are not zero.
template <class Real>
size_t count_spoken(Team& team, const Real* x, size_t n);

}  // namespace sparsefold
