#include "train.hpp"

#include <dlfcn.h>
#include <pthread.h>
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

namespace {

bool in_child_of_fork = false;
[[maybe_unused]] const int watched = pthread_atfork(nullptr, nullptr, [] { in_child_of_fork = true; });

template <class F>
F named(void* library, const char* name) {
    return reinterpret_cast<F>(library ? dlsym(library, name) : nullptr);
}

}  // namespace

/// In a child of fork the runtime still counts on the threads of its parent.
Team::Runtime::Runtime() {
#if defined(__linux__)
    void* library = in_child_of_fork ? nullptr : dlopen("libgomp.so.1", RTLD_LAZY | RTLD_NOLOAD);
    parallel = named<decltype(parallel)>(library, "GOMP_parallel");
    number = named<decltype(number)>(library, "omp_get_thread_num");
    members = named<decltype(members)>(library, "omp_get_num_threads");
    if (!number || !members) parallel = nullptr;
#endif
}

Team::Team(size_t size, bool runtime) : size_(size), process_(getpid()) {
    if (runtime && runtime_.parallel) return;
    runtime_.parallel = nullptr;
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

void (*Team::meeting())(void*) {
    return [](void* team) { static_cast<Team*>(team)->meet(); };
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
        work_(context_, Member{number, members_, meeting(), this});
        lock.lock();
        if (--busy_ == 0) done_.notify_one();
    }
}

void Team::dispatch(size_t most, Work work, const void* context) {
    const std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    const uint32_t members = static_cast<uint32_t>(std::min(most, size()));
    if (!turn || members < 2 || process_ != getpid()) return work(context, Member{0, 1, [](void*) {}, nullptr});
    if (runtime_.parallel) {
        work_ = work;
        context_ = context;
        const auto serve = [](void* team) {
            Team& t = *static_cast<Team*>(team);
            const auto count = static_cast<uint32_t>(t.runtime_.members());  // it may give fewer than were asked for
            t.members_ = count;                                              // by each, before it meets the others
            t.work_(t.context_, Member{static_cast<uint32_t>(t.runtime_.number()), count, t.meeting(), team});
        };
        return runtime_.parallel(serve, this, members, 0);
    }
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        members_ = members;
        work_ = work;
        context_ = context;
        busy_ = members - 1;
        ++round_;
    }
    wake_.notify_all();
    work(context, Member{0, members, meeting(), this});
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
}

const Sequences& sequences(const std::string& isa, std::string* chosen) {
    std::string name;
    kernels(isa, &name);
    if (chosen) *chosen = name;
#ifdef SPARSEFOLD_X86
    if (name == "avx512vnni" || name == "avx512") return sequences_avx512;
    if (name == "avx2") return sequences_avx2;
#endif
#ifdef SPARSEFOLD_ARM64
    if (name == "neon") return sequences_neon;
#endif
    return sequences_generic;
}

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

/// The room of what is sifted; pages that nothing falls into are never touched.
template <class Real>
struct Sieve {
    Room<uint32_t> start, lane, row;
    Room<Real> value;
    Sieve(SiftArgs<Real>& a, uint32_t rows, uint32_t cols) {
        const size_t parts = count_of_segments(cols), stride = sifted_stride(rows);
        start = Room<uint32_t>(parts * (size_t{rows} + 1));
        lane = Room<uint32_t>(parts * stride);
        row = Room<uint32_t>(parts * stride);
        value = Room<Real>(parts * stride);
        a.out = {rows, cols, stride, start.get(), lane.get(), row.get(), value.get()};
    }
};

constexpr size_t kTileRoom = 3 * kTile;

}  // namespace

std::vector<uint64_t> blocks_of(const uint8_t* mask, uint32_t gates, uint32_t units, uint32_t cols) {
    const uint32_t segments = count_of_segments(cols);
    std::vector<uint64_t> live(static_cast<size_t>(count_of_groups(units)) * gates * segments, 0);
    for (uint32_t gate = 0; gate < gates; ++gate)
        for (uint32_t unit = 0; unit < units; ++unit) {
            const uint8_t* row = mask + (static_cast<size_t>(gate) * units + unit) * cols;
            uint64_t* bits = live.data() + static_cast<size_t>(unit / kLanes * gates + gate) * segments;
            for (uint32_t c = 0; c < cols; ++c) bits[c / kSegment] |= uint64_t{row[c] != 0} << c % kSegment;
        }
    return live;
}

namespace {

template <class F>
void each_live(const BlockPattern& p, const F& f) {  // f(row, col)
    const uint32_t segments = count_of_segments(p.cols), rows = count_of_groups(p.units) * p.gates;
    for (uint32_t row = 0; row < rows; ++row)
        for (uint32_t s = 0; s < segments; ++s)
            for (uint64_t bits = p.live[static_cast<size_t>(row) * segments + s]; bits; bits &= bits - 1)
                f(row, s * kSegment + static_cast<uint32_t>(__builtin_ctzll(bits)));
}

size_t count_live(const BlockPattern& p) {
    size_t n = 0;
    for (const uint64_t bits : p.live) n += static_cast<size_t>(__builtin_popcountll(bits));
    return n;
}

void find_places(BlockPattern& p, size_t blocks) {
    const uint32_t tiles = count_of_tiles(p.units), rows = kTile / kLanes * p.gates;
    std::vector<uint32_t> strip_of(tiles);
    for (uint32_t strip = 0; strip < p.strips; ++strip)
        for (uint64_t t = uint64_t{tiles} * strip / p.strips; t < uint64_t{tiles} * (strip + 1) / p.strips; ++t)
            strip_of[t] = strip;
    p.start.assign(static_cast<size_t>(p.cols) * p.strips + 1, 0);
    const auto place = [&](uint32_t row, uint32_t col) {
        return static_cast<size_t>(col) * p.strips + strip_of[row / rows];
    };
    each_live(p, [&](uint32_t row, uint32_t col) { ++p.start[place(row, col) + 1]; });
    for (size_t i = 1; i < p.start.size(); ++i) p.start[i] += p.start[i - 1];
    std::vector<uint32_t> at(p.start.begin(), p.start.end() - 1);
    p.row.resize(blocks);
    p.row_start.assign(static_cast<size_t>(count_of_groups(p.units)) * p.gates + 1, 0);
    p.col.reserve(blocks);
    each_live(p, [&](uint32_t row, uint32_t col) {
        p.row[at[place(row, col)]++] = row;
        ++p.row_start[row + 1];
        p.col.push_back(col);
    });
    for (size_t i = 1; i < p.row_start.size(); ++i) p.row_start[i] += p.row_start[i - 1];
}

/// Of a few blocks of every row of blocks, the share that is live.
template <class Real>
double guess_share(const Real* weight, uint32_t gates, uint32_t units, uint32_t cols) {
    constexpr uint32_t kFew = 8;
    const uint32_t few = std::min(cols, kFew);
    size_t live = 0, seen = 0;
    for (uint32_t gate = 0; gate < gates; ++gate)
        for (uint32_t unit = 0; unit < units; unit += kLanes) {
            const uint32_t first =
                static_cast<uint32_t>((unit / kLanes + gate) * uint64_t{2654435761u} % (cols - few + 1));
            for (uint32_t c = first; c < first + few; ++c, ++seen)
                for (uint32_t r = unit; r < std::min(unit + kLanes, units); ++r)
                    if (weight[(static_cast<size_t>(gate) * units + r) * cols + c] != 0) {
                        ++live;
                        break;
                    }
        }
    return seen ? static_cast<double>(live) / static_cast<double>(seen) : 0;
}
constexpr double kDoubt = 0.1;  // of that guess

}  // namespace

template <class Real>
double Blocks<Real>::share() const {
    if (!pattern) return 1;
    const size_t all = static_cast<size_t>(count_of_groups(pattern->units)) * pattern->gates * pattern->cols;
    return all ? static_cast<double>(count_live(*pattern)) / static_cast<double>(all) : 0;
}

template <class Real>
BlockWeight<Real> Blocks<Real>::view() const {
    const BlockPattern& p = *pattern;
    return {p.start.data(), p.row.data(), values.get(), p.row_start.data(), p.col.data(), by_row.get(), p.gates,
            p.units,        p.cols,       p.strips};
}

template <class Real>
Blocks<Real> pack_blocks(Team& team, const SequenceKernels<Real>& k, const Real* weight, uint32_t gates, uint32_t units,
                         uint32_t cols, const uint64_t* kept, double most, const Blocks<Real>* previous) {
    const uint32_t strips = std::max(1u, std::min(static_cast<uint32_t>(team.size()), count_of_tiles(units)));
    const BlockPattern* old = previous ? previous->pattern.get() : nullptr;
    if (old && (old->gates != gates || old->units != units || old->cols != cols || old->strips != strips))
        old = nullptr;
    const bool was_packed = old && !old->start.empty();
    if (!kept && !was_packed && guess_share(weight, gates, units, cols) > most + kDoubt)
        return {nullptr, Room<Real>(), Room<Real>()};
    auto found = std::make_shared<BlockPattern>();
    found->gates = gates, found->units = units, found->cols = cols, found->strips = strips;
    if (old)
        found->live = old->live;
    else
        found->live.assign(static_cast<size_t>(count_of_groups(units)) * gates * count_of_segments(cols), 0);
    std::vector<uint8_t> changed(team.size(), 0), wild(team.size(), 0);
    const Room<uint32_t> cursor(team.size() * cols);
    PackBlocksArgs<Real> args{};
    args.weight = weight;
    args.gates = gates, args.units = units, args.cols = cols, args.strips = strips;
    args.kept = kept;
    args.live = found->live.data();
    args.cursor = cursor.get();
    args.changed = changed.data();
    args.wild = wild.data();
    const auto any = [](const std::vector<uint8_t>& v) { return std::find(v.begin(), v.end(), 1) != v.end(); };
    const auto fill = [&](const BlockPattern& pattern) {
        Blocks<Real> out{nullptr, Room<Real>(pattern.row.size() * kLanes), Room<Real>(pattern.row.size() * kLanes)};
        args.start = pattern.start.data();
        args.row_start = pattern.row_start.data();
        args.values = out.values.get();
        args.by_row = out.by_row.get();
        team.run(strips, [&](const Member& m) { k.pack_blocks(args, m); });
        return out;
    };
    if (was_packed) {
        Blocks<Real> out = fill(*old);
        out.pattern = previous->pattern;
        if (!any(wild) && !any(changed)) return out;
        args.start = nullptr;
    } else {
        team.run(strips, [&](const Member& m) { k.pack_blocks(args, m); });
    }
    Blocks<Real> out{found, Room<Real>(), Room<Real>()};
    if (any(wild) || out.share() > most) return out;
    find_places(*found, count_live(*found));
    out = fill(*found);
    out.pattern = found;
    return out;
}

template <class Real>
bool transpose(Team& team, const SequenceKernels<Real>& k, TransposeArgs<Real> args) {
    std::vector<uint32_t> wild(team.size(), 0);
    args.wild = wild.data();
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.transpose(args, m); });
    return std::find(wild.begin(), wild.end(), 1u) != wild.end();
}

template <class Real>
void input_product(Team& team, const SequenceKernels<Real>& k, InputProductArgs<Real> args, const Real* x,
                   uint32_t rows, uint32_t cols) {
    const BlockWeight<Real>& w = args.blocks;
    args.room_of_member = args.dense ? size_t{kTogether} * pad(cols) * kLanes
                          : w.start  ? size_t{w.gates} * pad(w.units)
                                     : size_t{args.weight.gates} * kTile * product_rows(rows);
    const Room<Real> room(team.size() * args.room_of_member);
    args.room = room.get();
    SiftArgs<Real> from{};
    from.rest = x;
    const Sieve<Real> sieve(from, args.dense ? 0 : rows, cols);
    args.x = from.out;
    args.x.rows = rows;
    team.run(team.size(), [&](const Member& m) {
        if (!args.dense) {
            k.sift(from, m);
            m.wait(m.team);
        }
        k.input_product(args, m);
    });
}

template <class Real>
void input_gradient(Team& team, const SequenceKernels<Real>& k, InputGradientArgs<Real> args) {
    const Room<Real> room(team.size() * kTogether * pad(args.blocks.cols) * kLanes);
    args.room = room.get();
    team.run(team.size(), [&](const Member& m) { k.input_gradient(args, m); });
}

template <class Real>
void egru_forward(Team& team, const SequenceKernels<Real>& k, EgruForwardArgs<Real> args) {
    const Lists<Real> first(args.batch, args.units), second(args.batch, args.units);
    const Room<Real> scaled(args.reset_after ? 0 : args.batch * first.view.stride);
    args.room_of_sums = args.blocks.start ? 3 * pad(args.units) : args.batch * kTileRoom;
    const Room<Real> room(team.size() * args.room_of_sums);
    args.spoken[0] = first.view;
    args.spoken[1] = second.view;
    args.scaled = scaled.get();
    args.room = room.get();
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.egru_forward(args, m); });
}

namespace {

/// Of the gradients of messages, the share that is needed: of some steps, all that spoke or are near enough to it.
template <class Real>
double needed_share(const EgruArgs<Real>& a) {
    constexpr uint32_t kApart = 8;
    if (a.event != Event::threshold || a.every) return 1;
    size_t needed = 0, seen = 0;
    for (uint32_t t = 0; t < a.steps; t += kApart)
        for (uint32_t b = 0; b < a.batch; ++b) {
            const Real* u = a.u + (static_cast<size_t>(t) * a.batch + b) * a.units;
            for (uint32_t j = 0; j < a.units; ++j) needed += u[j] - a.theta[j] > -a.half_width;
            seen += a.units;
        }
    return seen ? static_cast<double>(needed) / static_cast<double>(seen) : 0;
}
constexpr double kFewNeeded = 0.25;  // up to which lists of them beat all of them with the samples in the lanes

}  // namespace

template <class Real>
void egru_backward(Team& team, const SequenceKernels<Real>& k, EgruBackwardArgs<Real> args) {
    const size_t lanes = pad(args.batch), groups = count_of_groups(args.units), members = team.size();
    args.all = args.blocks.start && needed_share(args) * args.batch > kFewNeeded * static_cast<double>(lanes);
    const size_t step = (args.all ? lanes : args.batch) * pad(args.units);
    const Room<Real> room(args.all ? members * kTogether * pad(args.units) * kLanes : 0);
    const Room<uint32_t> bounds(args.all ? members * groups * 6 : 0);
    args.room = room.get();
    args.bounds = bounds.get();
    const size_t parts = count_of_near(args.units), stride = parts * kNear;
    const Room<uint32_t> index(args.batch * stride), count(args.batch * parts), any(parts);
    const Room<Real> value(args.batch * stride);
    args.need = {index.get(), value.get(), count.get(), any.get(), stride};
    const size_t gates = args.reset_after ? 3 : 2, alone = args.reset_after ? 0 : 1;
    const Room<Real> sent(2 * gates * step), sent_n(2 * alone * step), back(alone * step);
    args.back = back.get();
    if (args.all && lanes > args.batch) {  // the lanes of no sample
        std::fill_n(sent.get(), 2 * gates * step, Real(0));
        std::fill_n(sent_n.get(), 2 * alone * step, Real(0));
    }
    for (size_t i = 0; i < 2; ++i) {
        args.sent[i] = sent.get() + i * gates * step;
        args.sent_n[i] = alone ? sent_n.get() + i * step : nullptr;
    }
    team.run(count_of_tiles(args.units), [&](const Member& m) { k.egru_backward(args, m); });
}

template <class Real>
void outer(Team& team, const SequenceKernels<Real>& k, OuterArgs<Real> args, SiftArgs<Real> from, uint32_t rows,
           uint32_t cols) {
    const Sieve<Real> sieve(from, rows, cols);
    const Room<Real> room(team.size() * outer_chunk(rows) * args.gates * kPair);
    args.x = from.out;
    args.room = room.get();
    team.run(team.size(), [&](const Member& m) {
        k.sift(from, m);
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

#define SPARSEFOLD_FOR(Real)                                                                                      \
    template struct Blocks<Real>;                                                                                 \
    template Blocks<Real> pack_blocks<Real>(Team&, const SequenceKernels<Real>&, const Real*, uint32_t, uint32_t, \
                                            uint32_t, const uint64_t*, double, const Blocks<Real>*);              \
    template bool transpose<Real>(Team&, const SequenceKernels<Real>&, TransposeArgs<Real>);                      \
    template void input_product<Real>(Team&, const SequenceKernels<Real>&, InputProductArgs<Real>, const Real*,   \
                                      uint32_t, uint32_t);                                                        \
    template void input_gradient<Real>(Team&, const SequenceKernels<Real>&, InputGradientArgs<Real>);             \
    template void egru_forward<Real>(Team&, const SequenceKernels<Real>&, EgruForwardArgs<Real>);                 \
    template void egru_backward<Real>(Team&, const SequenceKernels<Real>&, EgruBackwardArgs<Real>);               \
    template void outer<Real>(Team&, const SequenceKernels<Real>&, OuterArgs<Real>, SiftArgs<Real>, uint32_t,     \
                              uint32_t);                                                                          \
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

namespace {

constexpr double kFewLanes = 0.25;  // filled up to which samples are better taken one by one
bool fill_lanes(uint32_t batch) { return batch > kFewLanes * pad(batch); }

}  // namespace

template <class Real>
void gated_forward(Team& team, const SequenceKernels<Real>& k, GatedForwardArgs<Real> args) {
    const uint32_t H = args.units, gates = gates_of(args.kind);
    const size_t step = static_cast<size_t>(args.batch) * H;
    const bool before = args.kind == Gated::gru_before, blocks = args.blocks.start;
    const uint32_t now = before ? 2 : gates, vectors = before ? 2 : gates == 1 ? kPanelVectors : 1;
    const PanelRoom<Real> panels(now, vectors, blocks ? 0 : H, H),
        panels_n(1, kPanelVectors, !blocks && before ? H : 0, H);
    args.lanes = blocks && fill_lanes(args.batch);
    const size_t spread = args.lanes ? size_t{pad(args.batch)} * pad(H) : step;
    const Room<Real> state(blocks && !args.lanes ? 0 : 2 * spread), scaled(before ? spread : 0);
    if (args.lanes) {
        std::fill_n(state.get(), 2 * spread, Real(0));
        std::fill_n(scaled.get(), before ? spread : 0, Real(0));
    }
    std::vector<uint8_t> wild(args.lanes ? args.batch : 0, 0);
    args.wild = wild.data();
    args.room_of_sums = blocks ? size_t{gates} * pad(H) : size_t{args.batch} * kPanelVectors * kLanes;
    const Room<Real> room(team.size() * args.room_of_sums);
    args.panels = panels.view;
    args.panels_n = panels_n.view;
    args.state[0] = state.get();
    args.state[1] = state.get() + (blocks && !args.lanes ? 0 : spread);
    args.scaled = scaled.get();
    args.room = room.get();
    team.run(count_of_panels(H, before ? kPanelVectors : vectors), [&](const Member& m) { k.gated_forward(args, m); });
}

template <class Real>
void gated_backward(Team& team, const SequenceKernels<Real>& k, GatedBackwardArgs<Real> args) {
    const uint32_t H = args.units, gates = gates_of(args.kind);
    const bool before = args.kind == Gated::gru_before, blocks = args.blocks.start;
    args.lanes = blocks && fill_lanes(args.batch);
    const size_t samples = args.lanes ? pad(args.batch) : args.batch;
    const size_t rows = size_t{args.steps} * args.batch, sums = size_t{gates} * pad(H) * samples;
    const PanelRoom<Real> panels(1, kPanelVectors, blocks ? 0 : H, gates * H);
    const Room<Real> sent(2 * sums), back(before ? size_t{args.batch} * H : 0);
    if (args.lanes) std::fill_n(sent.get(), 2 * sums, Real(0));
    args.room_of_sums = args.lanes ? size_t{kTogether} * pad(H) * kLanes : size_t{args.batch} * kPanelVectors * kLanes;
    const Room<Real> room(team.size() * args.room_of_sums);
    const Room<uint32_t> bounds(args.lanes ? team.size() * count_of_groups(H) * gates * 2 : 0);
    args.bounds = bounds.get();
    std::vector<uint8_t> wild(blocks ? rows : 0, 0);
    args.panels = panels.view;
    args.sent[0] = sent.get();
    args.sent[1] = sent.get() + sums;
    args.wild = wild.data();
    args.back = back.get();
    args.room = room.get();
    team.run(count_of_panels(H, kPanelVectors), [&](const Member& m) { k.gated_backward(args, m); });
}

template <class Real>
void outer_blocks(Team& team, const SequenceKernels<Real>& k, OuterBlocksArgs<Real> args, const BlockPattern& pattern) {
    std::vector<uint32_t> start(static_cast<size_t>(count_of_groups(args.units)) * args.gates + 1, 0), col;
    col.reserve(count_live(pattern));
    each_live(pattern, [&](uint32_t row, uint32_t c) {
        col.push_back(c);
        start[row + 1] = static_cast<uint32_t>(col.size());
    });
    for (size_t i = 1; i < start.size(); ++i) start[i] = std::max(start[i], start[i - 1]);
    constexpr double kFewEvents = 0.25;  // of x, up to which lists of them beat reading all of it
    const size_t inputs = pad(args.cols), told = args.rows - args.head_rows;
    const bool events = args.wild && static_cast<double>(count_spoken(team, args.rest, told * args.cols)) <=
                                         kFewEvents * static_cast<double>(told * args.cols);
    const Room<Real> sums(col.size() * kLanes), room(2 * inputs * kTurned);
    const Room<uint16_t> row(events ? 2 * inputs * kTurned : 0), count(events ? 2 * inputs : 0);
    args.row = row.get();
    args.count = count.get();
    std::fill_n(sums.get(), col.size() * kLanes, Real(0));
    args.start = start.data();
    args.col = col.data();
    args.sums = sums.get();
    args.room = room.get();
    team.run(start.size() - 1, [&](const Member& m) { k.outer_blocks(args, m); });
}

template void gated_forward<float>(Team&, const SequenceKernels<float>&, GatedForwardArgs<float>);
template void gated_forward<double>(Team&, const SequenceKernels<double>&, GatedForwardArgs<double>);
template void gated_backward<float>(Team&, const SequenceKernels<float>&, GatedBackwardArgs<float>);
template void gated_backward<double>(Team&, const SequenceKernels<double>&, GatedBackwardArgs<double>);

template void outer_blocks<float>(Team&, const SequenceKernels<float>&, OuterBlocksArgs<float>, const BlockPattern&);
template void outer_blocks<double>(Team&, const SequenceKernels<double>&, OuterBlocksArgs<double>, const BlockPattern&);

}  // namespace sparsefold
