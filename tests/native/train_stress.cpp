// The training kernels without Python, for sanitizers and for emulated processors: every form, odd sizes, dense weights
// and weights in blocks, teams of one to three, whose bits must agree, every instruction set beside plain C++, and two
// threads that train on one team with the same blocks. Built and run by tests/native/test_sanitizers.py, test_arm64.py.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <stdexcept>
#include <thread>

#include "../../native/train.hpp"

using namespace sparsefold;

namespace {

struct Shape {
    uint32_t steps, batch, inputs, units;
};
struct Form {
    Reset reset;
    Event event;
    bool reset_after, blocks, masked;
};

template <class Real>
std::vector<Real> draw(std::mt19937& random, size_t n, double share = 1) {
    std::normal_distribution<double> normal(0, 0.4);
    std::uniform_real_distribution<> uniform(0, 1);
    std::vector<Real> out(n);
    for (Real& v : out) v = uniform(random) < share ? static_cast<Real>(normal(random)) : Real(0);
    return out;
}

/// A weight whose blocks are gone but for a share.
template <class Real>
std::vector<Real> weight(std::mt19937& random, uint32_t units, uint32_t cols, double share) {
    std::vector<Real> w = draw<Real>(random, size_t{3} * units * cols);
    std::uniform_real_distribution<> uniform(0, 1);
    for (uint32_t gate = 0; gate < 3; ++gate)
        for (uint32_t unit = 0; unit < units; unit += kLanes)
            for (uint32_t c = 0; c < cols; ++c)
                if (uniform(random) >= share)
                    for (uint32_t r = unit; r < std::min(unit + kLanes, units); ++r)
                        w[(size_t{gate} * units + r) * cols + c] = 0;
    return w;
}

/// A weight as the kernels read it, the gates from `first` on.
template <class Real>
struct Ready {
    Room<Real> turned;
    Blocks<Real> blocks;
    BlockWeight<Real> sparse{};
    Transposed<Real> dense{};
    Ready(Team& team, const SequenceKernels<Real>& k, const std::vector<Real>& w, uint32_t first, uint32_t gates,
          uint32_t units, uint32_t cols, bool in_blocks) {
        const Real* from = w.data() + size_t{first} * units * cols;
        blocks = pack_blocks<Real>(team, k, from, gates, units, cols, nullptr, 1, nullptr);
        blocks = pack_blocks<Real>(team, k, from, gates, units, cols, nullptr, 1, &blocks);  // its pattern is known now
        if (in_blocks && !blocks.packed()) throw std::runtime_error("few blocks were not packed");
        dense = {nullptr, gates, units, cols};
        if (in_blocks) {
            sparse = blocks.view();
            return;
        }
        turned = Room<Real>(transposed_size(gates, units, cols));
        TransposeArgs<Real> args{};
        args.weight = from;
        args.values = turned.get();
        args.gates = gates, args.units = units, args.cols = cols;
        transpose(team, k, args);
        dense.values = turned.get();
    }
};

/// One layer forward and backward; everything it made, side by side.
template <class Real>
std::vector<Real> layer(Team& team, const SequenceKernels<Real>& k, const Shape& s, const Form& form, uint32_t seed) {
    std::mt19937 random(seed);
    const size_t rows = size_t{s.steps} * s.batch, state = size_t{s.batch} * s.units, all = rows * s.units;
    const uint32_t H = s.units, I = s.inputs;
    const double share = form.blocks ? 0.2 : 1;
    const auto w_ih = weight<Real>(random, H, I, share), w_hh = weight<Real>(random, H, H, share);
    const auto x = draw<Real>(random, rows * I, 0.3), y0 = draw<Real>(random, state, 0.3),
               h0 = draw<Real>(random, state);
    const auto bias = draw<Real>(random, size_t{3} * H), theta = draw<Real>(random, H), grad = draw<Real>(random, all);
    auto mask = draw<Real>(random, all, 0.5);
    for (Real& v : mask) v = v != 0;
    std::vector<Real> tape(rows * 4 * H), u(all), o(all), y(all), h(state), gates(rows * 4 * H), dy(state), dh(state);
    std::vector<Real> dtheta(H), dbias(size_t{4} * H), dw_i(size_t{3} * H * I), dw_h(size_t{3} * H * H), dx(rows * I);
    std::vector<uint8_t> wild(rows);
    const Ready<Real> w_i(team, k, w_ih, 0, 3, H, I, form.blocks);
    const Ready<Real> w(team, k, w_hh, 0, form.reset_after ? 3 : 2, H, H, form.blocks);
    std::optional<Ready<Real>> w_n;
    if (!form.reset_after) w_n.emplace(team, k, w_hh, 2, 1, H, H, form.blocks);
    InputProductArgs<Real> product{};
    product.weight = w_i.dense;
    product.blocks = w_i.sparse;
    product.bias = bias.data();
    product.out = tape.data();
    product.stride = size_t{4} * H;
    if (form.blocks && form.masked) product.dense = x.data();
    input_product(team, k, product, x.data(), static_cast<uint32_t>(rows), I);
    const auto shared = [&](EgruArgs<Real>& a) {
        a.steps = s.steps, a.batch = s.batch, a.units = H;
        a.reset = form.reset, a.event = form.event, a.reset_after = form.reset_after;
        a.height = Real(0.7), a.half_width = Real(0.3), a.keep = form.masked ? Real(0) : Real(0.2);
        a.hidden = w.dense, a.blocks = w.sparse;
        if (w_n) a.hidden_n = w_n->dense, a.blocks_n = w_n->sparse;
        a.theta = theta.data(), a.mask = form.masked ? mask.data() : nullptr;
        a.y0 = y0.data(), a.h0 = h0.data(), a.tape = tape.data(), a.u = u.data(), a.y = y.data();
    };
    EgruForwardArgs<Real> forward{};
    shared(forward);
    forward.o = o.data();
    forward.bias_n = form.reset_after ? bias.data() : nullptr;
    forward.h = h.data();
    egru_forward(team, k, forward);
    EgruBackwardArgs<Real> backward{};
    shared(backward);
    backward.grad_y = grad.data(), backward.grad_u = nullptr, backward.grad_o = grad.data();
    backward.grad_y_n = h0.data(), backward.grad_h_n = nullptr, backward.wants_y0 = true;
    backward.gates = gates.data(), backward.dy = dy.data(), backward.dh = dh.data();
    backward.dtheta = dtheta.data(), backward.dbias = dbias.data(), backward.wild = wild.data();
    egru_backward(team, k, backward);
    const auto gradient = [&](uint32_t cols, const Real* head, const Real* rest, std::vector<Real>& out,
                              const Blocks<Real>& b) {
        if (form.blocks && b.pattern->gates == 3 && seed % 3) {  // by lists of events, or by all of x
            OuterBlocksArgs<Real> a{};
            a.rows = static_cast<uint32_t>(rows), a.units = H, a.cols = cols, a.gates = 3;
            a.g = gates.data(), a.stride = size_t{4} * H;
            a.part[1] = H, a.part[2] = 2 * H;
            a.head = head, a.head_rows = head ? s.batch : 0, a.rest = rest;
            a.wild = seed % 3 == 1 ? wild.data() : nullptr;
            a.out = out.data();
            return outer_blocks(team, k, a, *b.pattern);
        }
        OuterArgs<Real> a{};
        a.units = H, a.gates = 3, a.g = gates.data(), a.stride = size_t{4} * H;
        a.part[1] = H, a.part[2] = 2 * H;
        a.live = form.blocks && b.pattern->gates == 3 ? b.pattern->live.data() : nullptr;
        a.out = out.data();
        SiftArgs<Real> from{};
        from.head = head, from.head_rows = head ? s.batch : 0, from.rest = rest, from.wild = wild.data();
        outer(team, k, a, from, static_cast<uint32_t>(rows), cols);
    };
    gradient(I, nullptr, x.data(), dw_i, w_i.blocks);
    gradient(H, y0.data(), y.data(), dw_h, w.blocks);
    if (form.blocks) {
        InputGradientArgs<Real> a{};
        a.blocks = w_i.sparse;
        a.rows = static_cast<uint32_t>(rows);
        a.g = gates.data(), a.stride = size_t{4} * H, a.out = dx.data();
        input_gradient(team, k, a);
    }
    std::vector<Real> found;
    for (const auto* part : {&u, &o, &y, &h, &dy, &dh, &dtheta, &dbias, &dw_i, &dw_h, &dx})
        found.insert(found.end(), part->begin(), part->end());
    return found;
}

/// A layer whose state is dense, forward and backward.
template <class Real>
std::vector<Real> dense_state(Team& team, const SequenceKernels<Real>& k, const Shape& s, Gated kind, bool in_blocks,
                              uint32_t seed) {
    std::mt19937 random(seed);
    const uint32_t H = s.units, gates = gates_of(kind), values = tape_of(kind);
    const size_t state = size_t{s.batch} * H, all = state * s.steps;
    const bool before = kind == Gated::gru_before, pair = kind == Gated::lstm;
    auto w = weight<Real>(random, H, H, in_blocks ? 0.2 : 1);
    w.resize(size_t{3} * H * H);
    const auto fourth = weight<Real>(random, H, H, in_blocks ? 0.2 : 1);
    w.insert(w.end(), fourth.begin(), fourth.begin() + size_t{H} * H);
    const auto h0 = draw<Real>(random, state), grad = draw<Real>(random, all);
    auto tape = draw<Real>(random, all * values);
    std::vector<Real> out(all), cells(all), sums(all * values), dh(state), dc(state), dbias(size_t{values} * H);
    Blocks<Real> blocks, blocks_n;
    if (in_blocks) {
        const uint32_t first = before ? 2 : gates;
        blocks = pack_blocks<Real>(team, k, w.data(), first, H, H, nullptr, 1, nullptr);
        if (before) blocks_n = pack_blocks<Real>(team, k, w.data() + size_t{2} * H * H, 1, H, H, nullptr, 1, nullptr);
    }
    const auto shared = [&](GatedArgs<Real>& a) {
        a.kind = kind, a.steps = s.steps, a.batch = s.batch, a.units = H;
        a.weight = w.data(), a.h0 = h0.data(), a.c0 = pair ? h0.data() : nullptr;
        a.tape = tape.data(), a.out = out.data(), a.cells = pair ? cells.data() : nullptr;
        if (in_blocks) a.blocks = blocks.view();
        if (in_blocks && before) a.blocks_n = blocks_n.view();
    };
    GatedForwardArgs<Real> forward{};
    shared(forward);
    gated_forward(team, k, forward);
    GatedBackwardArgs<Real> backward{};
    shared(backward);
    backward.grad_out = grad.data();
    backward.gates = sums.data(), backward.dh = dh.data(), backward.dc = pair ? dc.data() : nullptr;
    backward.dbias = dbias.data();
    gated_backward(team, k, backward);
    std::vector<Real> found;
    for (const auto* part : {&out, &sums, &dh, &dc, &dbias}) found.insert(found.end(), part->begin(), part->end());
    return found;
}

/// Whether two instruction sets found the same, but for rounding.
template <class Real>
bool near(const std::vector<Real>& a, const std::vector<Real>& b) {
    const Real bound = 2000 * std::numeric_limits<Real>::epsilon();
    for (size_t i = 0; i < a.size(); ++i)
        if (!(std::abs(a[i] - b[i]) <= bound * (1 + std::abs(b[i])))) return false;
    return true;
}

template <class Real>
void check(const std::string& isa, const std::vector<Shape>& shapes) {
    const SequenceKernels<Real>&k = sequences(isa).of(Real()), &plain = sequences("generic").of(Real());
    Team one(1), two(2), three(3);
    uint32_t seed = 0;
    for (const Shape& s : shapes)
        for (uint32_t form = 0; form < 16; ++form) {
            const Form f{static_cast<Reset>(form % 3), static_cast<Event>((form + s.units) % 3), form % 2 == 0,
                         form / 2 % 2 == 0, form / 4 % 2 == 0};
            const auto wanted = layer(one, k, s, f, ++seed);
            if (!near(wanted, layer(one, plain, s, f, seed))) throw std::runtime_error(isa + " finds something else");
            for (Team* team : {&two, &three}) {
                const auto found = layer(*team, k, s, f, seed);
                if (std::memcmp(found.data(), wanted.data(), wanted.size() * sizeof(Real)) != 0)
                    throw std::runtime_error("bits differ between teams on " + isa);
            }
        }
    for (const Shape& s : shapes)
        for (const Gated kind : {Gated::gru, Gated::gru_before, Gated::lstm, Gated::tanh, Gated::relu})
            for (const bool in_blocks : {false, true}) {
                const auto wanted = dense_state(one, k, s, kind, in_blocks, ++seed);
                if (!near(wanted, dense_state(one, plain, s, kind, in_blocks, seed)))
                    throw std::runtime_error(isa + " finds something else of a dense state");
                for (Team* team : {&two, &three}) {
                    const auto found = dense_state(*team, k, s, kind, in_blocks, seed);
                    if (std::memcmp(found.data(), wanted.data(), wanted.size() * sizeof(Real)) != 0)
                        throw std::runtime_error("bits of a dense state differ between teams on " + isa);
                }
            }
    const Shape s{4, 3, 40, 130};
    const Form f{Reset::threshold, Event::threshold, true, true, false};
    const auto wanted = layer(two, k, s, f, 1);
    const auto work = [&](bool* same) {
        *same = true;
        for (uint32_t i = 0; i < 3; ++i) *same &= layer(two, k, s, f, 1) == wanted;
    };
    bool same[2];
    std::thread other(work, &same[0]);
    work(&same[1]);
    other.join();
    if (!same[0] || !same[1]) throw std::runtime_error("two threads that share a team disturb each other");
}

}  // namespace

int main() {
    const std::vector<Shape> shapes = {{1, 1, 1, 1}, {3, 2, 17, 33}, {2, 5, 70, 70}, {2, 19, 33, 40}};
    try {
        for (const std::string& isa : available_isas()) {
            check<float>(isa, shapes);
            check<double>(isa, {shapes[1], shapes[3]});
        }
    } catch (const std::exception& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    std::puts("ok");
}
