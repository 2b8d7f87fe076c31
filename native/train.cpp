#include "train.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sparsefold {

void advise_large_pages(void* p, size_t bytes) {
#if defined(MADV_HUGEPAGE)
    constexpr uintptr_t kLarge = 2u << 20;
    const uintptr_t first = (reinterpret_cast<uintptr_t>(p) + kLarge - 1) / kLarge * kLarge;
    const uintptr_t last = (reinterpret_cast<uintptr_t>(p) + bytes) / kLarge * kLarge;
    if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#else
    static_cast<void>(p), static_cast<void>(bytes);
#endif
}

Team::Team(size_t size) : process_(getpid()) {
    try {
        while (threads_.size() + 1 < size)
            threads_.emplace_back([this, number = static_cast<uint32_t>(threads_.size() + 1)] { serve(number); });
    } catch (...) {  // the system gives no more of them
        dismiss();
        throw;
    }
}

Team::~Team() { dismiss(); }

void Team::Delete::operator()(Team* team) const {
    if (team->process_ == getpid()) delete team;  // in a child of fork its threads do not live, and none can be joined
}

void Team::dismiss() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& thread : threads_) thread.join();
}

/// Steps of a sequence are short: waiting spins, and yields where a member has lost its processor.
void Team::meet() {
    const uint32_t meeting = meetings_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == members_) {
        arrived_.store(0, std::memory_order_relaxed);
        meetings_.store(meeting + 1, std::memory_order_release);
        return;
    }
    for (uint32_t spins = 0; meetings_.load(std::memory_order_acquire) == meeting; ++spins) {
#if defined(__x86_64__)
        _mm_pause();
#endif
        if (spins > 2000) std::this_thread::yield();
    }
}

void Team::serve(uint32_t number) {
    uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
        wake_.wait(lock, [&] { return stop_ || round_ != seen; });
        if (stop_) return;
        seen = round_;
        if (number >= members_) continue;
        lock.unlock();
        work_(context_, Member{number, members_, [](void* team) { static_cast<Team*>(team)->meet(); }, this});
        lock.lock();
        if (--busy_ == 0) done_.notify_one();
    }
}

void Team::dispatch(size_t most, Work work, const void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const uint32_t members = static_cast<uint32_t>(std::min(most, size()));
    if (!turn || members < 2 || process_ != getpid()) return work(context, Member{0, 1, [](void*) {}, nullptr});
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        members_ = members;
        work_ = work;
        context_ = context;
        busy_ = members - 1;
        ++round_;
    }
    wake_.notify_all();
    work(context, Member{0, members, [](void* team) { static_cast<Team*>(team)->meet(); }, this});
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
}

#define SPARSEFOLD_MATVEC(format, dtype, Packed)
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed)
#define SPARSEFOLD_MATVEC_CODES(format, Packed)
#define SPARSEFOLD_CELL(name, Args)
#define SPARSEFOLD_SEQUENCE(name, Args) name = all.name##_f32;
template <>
SequenceKernels<float>::SequenceKernels(const Kernels& all) {
#include "kernels.def"
}
#undef SPARSEFOLD_SEQUENCE
#define SPARSEFOLD_SEQUENCE(name, Args) name = all.name##_f64;
template <>
SequenceKernels<double>::SequenceKernels(const Kernels& all) {
#include "kernels.def"
}
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
#undef SPARSEFOLD_SEQUENCE

namespace {

/// Lists of (rows, units) with the arrays that hold them.
template <class Real>
struct Lists {
    Room<uint32_t> index, count;
    Room<uint64_t> any;
    Room<Real> value;
    Spoken<Real> view;
    Lists(uint32_t rows, uint32_t units) {
        const size_t segments = count_of_segments(units), stride = segments * kSegment;
        index = Room<uint32_t>(rows * stride);
        count = Room<uint32_t>(segments * rows);
        any = Room<uint64_t>(segments);
        value = Room<Real>(rows * stride);
        view = {index.get(), value.get(), count.get(), any.get(), stride, rows};
    }
};

/// f(row, column, value) of what is not zero in `columns` of x (rows, cols), and of all in rows that are `whole`.
template <class Real, class Line, class Whole, class F>
void each_spoken(uint32_t first_row, uint32_t rows, uint32_t first_col, uint32_t cols, const Line& line,
                 const Whole& whole, const F& f) {
    for (uint32_t row = first_row; row < rows; ++row) {
        const Real* x = line(row);
        const bool all = whole(row);
        for (uint32_t c = first_col; c < cols; ++c)
            if (x[c] != 0 || all) f(row, c, x[c]);
    }
}

uint32_t part_of(uint32_t n, uint32_t number, const Member& m) {
    return static_cast<uint32_t>(static_cast<uint64_t>(n) * number / m.members);
}

constexpr size_t kTileRoom = 3 * kTile;

}  // namespace

template <class Real>
bool transpose(Team& team, const SequenceKernels<Real>& k, TransposeArgs<Real> args) {
    std::vector<uint32_t> wild(team.size(), 0);
    args.wild = wild.data();
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.transpose(args, m); });
    return std::find(wild.begin(), wild.end(), 1u) != wild.end();
}

template <class Real>
void input_product(Team& team, const SequenceKernels<Real>& k, const Transposed<Real>& weight, const Real* x,
                   uint32_t rows, const Real* bias, Real* out, size_t stride) {
    const auto each = [&](const Member& m, const auto& f) {
        each_spoken<Real>(
            part_of(rows, m.number, m), part_of(rows, m.number + 1, m), 0, weight.cols,
            [&](uint32_t r) { return x + static_cast<size_t>(r) * weight.cols; }, [](uint32_t) { return false; }, f);
    };
    std::vector<uint32_t> start(static_cast<size_t>(rows) + 1, 0);
    team.run(team.size(), [&](const Member& m) { each(m, [&](uint32_t r, uint32_t, Real) { ++start[r + 1]; }); });
    for (uint32_t r = 0; r < rows; ++r) start[r + 1] += start[r];
    const Room<uint32_t> index(start[rows]);
    const Room<Real> value(start[rows]);
    const InputProductArgs<Real> args{weight, rows, start.data(), index.get(), value.get(), bias, out, stride};
    team.run(team.size(), [&](const Member& m) {
        uint32_t at = start[part_of(rows, m.number, m)];
        each(m, [&](uint32_t, uint32_t c, Real v) {
            index.get()[at] = c;
            value.get()[at++] = v;
        });
        m.wait(m.team);
        k.input_product(args, m);
    });
}

template <class Real>
void egru_forward(Team& team, const SequenceKernels<Real>& k, EgruForwardArgs<Real> args) {
    const Lists<Real> first(args.batch, args.units), second(args.batch, args.units);
    const Room<Real> scaled(args.reset_after ? 0 : args.batch * first.view.stride);
    const Room<Real> room(team.size() * args.batch * kTileRoom);
    args.spoken[0] = first.view;
    args.spoken[1] = second.view;
    args.scaled = scaled.get();
    args.room = room.get();
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.egru_forward(args, m); });
}

template <class Real>
void egru_backward(Team& team, const SequenceKernels<Real>& k, EgruBackwardArgs<Real> args) {
    const size_t step = static_cast<size_t>(args.batch) * pad(args.units);
    const size_t parts = count_of_near(args.units), stride = parts * kNear;
    const Room<uint32_t> index(args.batch * stride), count(args.batch * parts), any(parts);
    const Room<Real> value(args.batch * stride);
    args.need = {index.get(), value.get(), count.get(), any.get(), stride};
    const size_t gates = args.reset_after ? 3 : 2, alone = args.reset_after ? 0 : 1;
    const Room<Real> sent(2 * gates * step), sent_n(2 * alone * step), back(alone * step);
    args.back = back.get();
    for (size_t i = 0; i < 2; ++i) {
        args.sent[i] = sent.get() + i * gates * step;
        args.sent_n[i] = alone ? sent_n.get() + i * step : nullptr;
    }
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.egru_backward(args, m); });
}

template <class Real>
void outer(Team& team, const SequenceKernels<Real>& k, OuterArgs<Real> args, const Columns<Real>& x) {
    const uint32_t cols = args.cols;
    const auto each = [&](const Member& m, const auto& f) {  // of this member's columns, by row
        each_spoken<Real>(
            0, args.rows, part_of(cols, m.number, m), part_of(cols, m.number + 1, m),
            [&](uint32_t r) {
                return r < x.head_rows ? x.head + static_cast<size_t>(r) * cols
                                       : x.rest + static_cast<size_t>(r - x.head_rows) * cols;
            },
            [&](uint32_t r) { return x.wild && x.wild[r]; }, f);
    };
    std::vector<uint32_t> start(static_cast<size_t>(cols) + 1, 0), at;
    team.run(team.size(), [&](const Member& m) { each(m, [&](uint32_t, uint32_t c, Real) { ++start[c + 1]; }); });
    for (uint32_t c = 0; c < cols; ++c) start[c + 1] += start[c];
    at.assign(start.begin(), start.end() - 1);
    const Room<uint32_t> row(start[cols]), cursor(team.size() * cols);
    const Room<Real> value(start[cols]), room(team.size() * outer_chunk(args.rows) * kTileRoom);
    args.start = start.data();
    args.row = row.get();
    args.value = value.get();
    args.room = room.get();
    args.cursor = cursor.get();
    team.run(team.size(), [&](const Member& m) {
        each(m, [&](uint32_t r, uint32_t c, Real v) {
            row.get()[at[c]] = r;
            value.get()[at[c]++] = x.scale ? v * x.scale[r * x.scale_stride + c] : v;
        });
        m.wait(m.team);
        k.outer(args, m);
    });
}

template <class Real>
size_t count_spoken(Team& team, const Real* x, size_t n) {
    std::vector<size_t> found(team.size(), 0);
    team.run(team.size(), [&](const Member& m) {
        const size_t first = n * m.number / m.members, last = n * (m.number + 1) / m.members;
        size_t total = 0;
        for (size_t i = first; i < last; ++i) total += x[i] != 0;
        found[m.number] = total;
    });
    size_t total = 0;
    for (const size_t each : found) total += each;
    return total;
}

#define SPARSEFOLD_FOR(Real)                                                                                     \
    template bool transpose<Real>(Team&, const SequenceKernels<Real>&, TransposeArgs<Real>);                     \
    template void input_product<Real>(Team&, const SequenceKernels<Real>&, const Transposed<Real>&, const Real*, \
                                      uint32_t, const Real*, Real*, size_t);                                     \
    template void egru_forward<Real>(Team&, const SequenceKernels<Real>&, EgruForwardArgs<Real>);                \
    template void egru_backward<Real>(Team&, const SequenceKernels<Real>&, EgruBackwardArgs<Real>);              \
    template void outer<Real>(Team&, const SequenceKernels<Real>&, OuterArgs<Real>, const Columns<Real>&);       \
    template size_t count_spoken<Real>(Team&, const Real*, size_t);
SPARSEFOLD_FOR(float)
SPARSEFOLD_FOR(double)

namespace {

/// Panels of a matrix with the room for its values: fresh pages, large ones where the system has them. Memory that was
/// given back before lies on small ones, whose list no processor holds for all of a large weight.
template <class Real>
class PanelRoom {
  public:
    PanelRoom(uint32_t gates, uint32_t vectors, uint32_t units, uint32_t depth)
        : view{nullptr, gates, vectors, units, depth} {
        const size_t n = static_cast<size_t>(count_of_panels(units, vectors)) * gates * vectors * kLanes * depth;
        if (n * sizeof(Real) < kLarge) {
            small_ = Room<Real>(n);
            view.values = small_.get();
            return;
        }
        bytes_ = n * sizeof(Real) + kLarge;
        pages_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (pages_ == MAP_FAILED) throw std::bad_alloc();
        const uintptr_t first = (reinterpret_cast<uintptr_t>(pages_) + kLarge - 1) / kLarge * kLarge;
        advise_large_pages(reinterpret_cast<void*>(first), n * sizeof(Real) + kLarge - 1);
        view.values = reinterpret_cast<Real*>(first);
    }
    PanelRoom(const PanelRoom&) = delete;
    ~PanelRoom() {
        if (pages_) munmap(pages_, bytes_);
    }
    Panels<Real> view;

  private:
    static constexpr size_t kLarge = 2u << 20;
    Room<Real> small_;
    void* pages_ = nullptr;
    size_t bytes_ = 0;
};

}  // namespace

template <class Real>
void gated_forward(Team& team, const SequenceKernels<Real>& k, GatedForwardArgs<Real> args) {
    const uint32_t H = args.units, gates = gates_of(args.kind);
    const size_t step = static_cast<size_t>(args.batch) * H;
    const bool before = args.kind == Gated::gru_before;
    const PanelRoom<Real> panels(before ? 2 : gates, before ? 2 : gates == 1 ? kPanelVectors : 1, H, H);
    const PanelRoom<Real> panels_n(before ? 1 : 0, kPanelVectors, H, H);
    const Room<Real> state(2 * step), scaled(before ? step : 0);
    const Room<Real> room(team.size() * args.batch * kPanelVectors * kLanes);
    args.panels = panels.view;
    args.panels_n = panels_n.view;
    args.state[0] = state.get();
    args.state[1] = state.get() + step;
    args.scaled = scaled.get();
    args.room = room.get();
    team.run(count_of_panels(H, before ? kPanelVectors : panels.view.vectors),
             [&](const Member& m) { k.gated_forward(args, m); });
}

template <class Real>
void gated_backward(Team& team, const SequenceKernels<Real>& k, GatedBackwardArgs<Real> args) {
    const uint32_t H = args.units, gates = gates_of(args.kind);
    const size_t step = static_cast<size_t>(args.batch) * H;
    const PanelRoom<Real> panels(1, kPanelVectors, H, gates * H);
    const Room<Real> sent(2 * gates * step), back(args.kind == Gated::gru_before ? step : 0);
    const Room<Real> room(team.size() * args.batch * kPanelVectors * kLanes);
    args.panels = panels.view;
    args.sent[0] = sent.get();
    args.sent[1] = sent.get() + gates * step;
    args.back = back.get();
    args.room = room.get();
    team.run(count_of_panels(H, kPanelVectors), [&](const Member& m) { k.gated_backward(args, m); });
}

template void gated_forward<float>(Team&, const SequenceKernels<float>&, GatedForwardArgs<float>);
template void gated_forward<double>(Team&, const SequenceKernels<double>&, GatedForwardArgs<double>);
template void gated_backward<float>(Team&, const SequenceKernels<float>&, GatedBackwardArgs<float>);
template void gated_backward<double>(Team&, const SequenceKernels<double>&, GatedBackwardArgs<double>);

}  // namespace sparsefold
