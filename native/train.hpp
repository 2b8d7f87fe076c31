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

namespace sparsefold {

/// The caller's thread and `size - 1` of its own, which sleep in between. One call at a time has their help; who comes
/// meanwhile, or in a child of fork, works alone. No bit depends on it.
class Team {
  public:
    static constexpr size_t kMost = 256;  // a wrong number must not fill the machine
    explicit Team(size_t size);           // 1 to kMost
    ~Team();
    Team(const Team&) = delete;
    size_t size() const { return threads_.size() + 1; }

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
    void dispatch(size_t most, Work work, const void* context);
    void serve(uint32_t number);
    void meet();
    void dismiss();
    std::vector<std::thread> threads_;
    const int process_;
    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    bool stop_ = false;
    uint64_t round_ = 0;
    size_t busy_ = 0;
    // The call; written under mutex_ while all threads sleep.
    uint32_t members_ = 0;
    Work work_ = nullptr;
    const void* context_ = nullptr;
    std::atomic<uint32_t> arrived_{0};
    std::atomic<uint32_t> meetings_{0};
};

/// The kernels of one real type.
template <class Real>
struct SequenceKernels {
#define SPARSEFOLD_MATVEC(format, dtype, Packed)
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed)
#define SPARSEFOLD_MATVEC_CODES(format, Packed)
#define SPARSEFOLD_CELL(name, Args)
#define SPARSEFOLD_SEQUENCE(name, Args) void (*name)(const Args<Real>&, const Member&);
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
#undef SPARSEFOLD_SEQUENCE
    explicit SequenceKernels(const Kernels& all);
};

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

/// Fills args.values; true where a weight is not finite.
template <class Real>
bool transpose(Team& team, const SequenceKernels<Real>& k, TransposeArgs<Real> args);

/// out (rows, stride) = bias + W x for what is not zero of x (rows, weight.cols).
template <class Real>
void input_product(Team& team, const SequenceKernels<Real>& k, const Transposed<Real>& weight, const Real* x,
                   uint32_t rows, const Real* bias, Real* out, size_t stride);

/// The pointers of room are filled in here.
template <class Real>
void egru_forward(Team& team, const SequenceKernels<Real>& k, EgruForwardArgs<Real> args);
template <class Real>
void egru_backward(Team& team, const SequenceKernels<Real>& k, EgruBackwardArgs<Real> args);

/// What an outer product reads of x (rows, cols): its first rows may lie elsewhere, each row may be scaled by another
/// array's, and rows whose gradient is not finite are read whole.
template <class Real>
struct Columns {
    const Real* head;  // (head_rows, cols)
    uint32_t head_rows;
    const Real* rest;   // (rows - head_rows, cols)
    const Real* scale;  // (rows, scale_stride) or null
    size_t scale_stride;
    const uint8_t* wild;  // (rows) or null
};
/// args.out = sum over rows of g x^T; the lists and the room of args are filled in here.
template <class Real>
void outer(Team& team, const SequenceKernels<Real>& k, OuterArgs<Real> args, const Columns<Real>& x);

/// The pointers of room are filled in here.
template <class Real>
void gated_forward(Team& team, const SequenceKernels<Real>& k, GatedForwardArgs<Real> args);
template <class Real>
void gated_backward(Team& team, const SequenceKernels<Real>& k, GatedBackwardArgs<Real> args);

/// Elements that are not zero.
template <class Real>
size_t count_spoken(Team& team, const Real* x, size_t n);

}  // namespace sparsefold
