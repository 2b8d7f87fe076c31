// Training kernels for Python (src/sparsefold/nn/native.py), in float and in double.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <stdexcept>

#include "train.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace sparsefold {

namespace {

template <class Real>
using In = nb::ndarray<const Real, nb::c_contig, nb::device::cpu>;
template <class Real>
using Out = nb::ndarray<Real, nb::c_contig, nb::device::cpu>;

/// The data of an array of `size` elements; null for None.
template <class Array>
auto data(const Array& a, size_t size, const char* name) -> decltype(a.data()) {
    if (!a.is_valid()) return nullptr;
    if (a.size() != size)
        throw std::invalid_argument(std::string(name) + " has " + std::to_string(a.size()) + " elements, expected " +
                                    std::to_string(size) + ".");
    return a.data();
}

template <class Array>
auto given(const Array& a, size_t size, const char* name) -> decltype(a.data()) {
    if (!a.is_valid()) throw std::invalid_argument(std::string(name) + " is missing.");
    return data(a, size, name);
}

uint32_t size32(size_t n, const char* name) {
    if (n > (1u << 28))
        throw std::invalid_argument(std::string(name) + " of " + std::to_string(n) + " is longer than 2^28.");
    return static_cast<uint32_t>(n);
}

/// Rows of a sequence: its entries of a part must be counted in 32 bits.
uint32_t rows32(size_t n) {
    if (n > (1u << 25)) throw std::invalid_argument("time x batch of " + std::to_string(n) + " is more than 2^25.");
    return static_cast<uint32_t>(n);
}

template <class T>
T one_of(const std::string& word, const char* const (&words)[3], const char* name) {
    for (uint32_t i = 0; i < 3; ++i)
        if (word == words[i]) return static_cast<T>(i);
    throw std::invalid_argument(std::string(name) + " '" + word + "' is not one of " + words[0] + ", " + words[1] +
                                ", " + words[2] + ".");
}

/// Bits of a mask's blocks.
struct KeptBlocks {
    uint32_t gates, units, cols;
    std::vector<uint64_t> bits;

    KeptBlocks(In<uint8_t> mask, uint32_t gates_of_it) : gates(gates_of_it) {
        if (mask.ndim() != 2 || gates < 1 || gates > 4 || mask.shape(0) % gates)
            throw std::invalid_argument("a mask is (gates * units, inputs), of one to four gates.");
        units = size32(mask.shape(0) / gates, "units");
        cols = size32(mask.shape(1), "inputs");
        bits = blocks_of(mask.data(), gates, units, cols);
    }
};

/// The view of packed blocks, of none for null.
template <class Real>
BlockWeight<Real> view(const Blocks<Real>* blocks, uint32_t gates, size_t units, size_t cols) {
    if (!blocks) return {};
    if (!blocks->packed()) throw std::invalid_argument("these blocks are not packed.");
    const BlockWeight<Real> w = blocks->view();
    if (w.gates != gates || w.units != units || w.cols != cols)
        throw std::invalid_argument("these are the blocks of another weight.");
    return w;
}

struct PyTeam {
    std::unique_ptr<Team, Team::Delete> team;
    std::string isa;
    const Sequences& table;

    PyTeam(size_t threads, const std::string& wanted, bool runtime) : table(sequences(wanted, &isa)) {
        if (threads < 1 || threads > Team::kMost)
            throw std::invalid_argument("a sequence is divided between 1 and " + std::to_string(Team::kMost) +
                                        " threads, got " + std::to_string(threads) + ".");
        team.reset(new Team(threads, runtime));
    }

    /// Asks for large pages behind an array nobody has written yet: a fault for 2 MB in place of 512, and a step's
    /// weights within reach of the processor's list of pages.
    template <class Real>
    void advise(Out<Real> x) const {
        advise_large_pages(x.data(), x.size() * sizeof(Real));
    }

    template <class Real>
    size_t count(In<Real> x) const {
        const nb::gil_scoped_release release;
        return count_spoken(*team, x.data(), x.size());
    }

    template <class Real>
    bool transpose(In<Real> weight, uint32_t gates, Out<Real> out) const {
        if (weight.ndim() != 2 || gates < 1 || gates > 3 || weight.shape(0) % gates)
            throw std::invalid_argument("a weight is (gates * units, inputs), of one to three gates.");
        TransposeArgs<Real> args{};
        args.weight = weight.data();
        args.gates = gates;
        args.units = size32(weight.shape(0) / gates, "units");
        args.cols = size32(weight.shape(1), "inputs");
        args.values = given(out, transposed_size(gates, args.units, args.cols), "out");
        const nb::gil_scoped_release release;
        return sparsefold::transpose(*team, table.of(Real()), args);
    }

    template <class Real>
    Blocks<Real> pack(In<Real> weight, uint32_t gates, double most, const Blocks<Real>* previous,
                      const KeptBlocks* kept) const {
        if (weight.ndim() != 2 || gates < 1 || gates > 4 || weight.shape(0) % gates)
            throw std::invalid_argument("a weight is (gates * units, inputs), of one to four gates.");
        const uint32_t units = size32(weight.shape(0) / gates, "units"), cols = size32(weight.shape(1), "inputs");
        if (kept && (kept->gates != gates || kept->units != units || kept->cols != cols))
            throw std::invalid_argument("this mask is another weight's.");
        const nb::gil_scoped_release release;
        return pack_blocks(*team, table.of(Real()), weight.data(), gates, units, cols,
                           kept ? kept->bits.data() : nullptr, most, previous);
    }

    template <class Real>
    void input_product(In<Real> weight, const Blocks<Real>* blocks, In<Real> bias, In<Real> x, bool events,
                       Out<Real> out) const {
        const uint32_t gates = blocks && blocks->packed() ? blocks->view().gates : 3;
        if (x.ndim() != 2 || out.ndim() != 2 || out.shape(0) != x.shape(0) || bias.size() % gates)
            throw std::invalid_argument("an input product reads (rows, inputs) and writes as many rows.");
        if (!events && !blocks) throw std::invalid_argument("all of x is read with blocks alone.");
        const uint32_t units = size32(bias.size() / gates, "units"), cols = size32(x.shape(1), "inputs");
        if (out.shape(1) < bias.size()) throw std::invalid_argument("the rows of an input product are too short.");
        InputProductArgs<Real> a{};
        a.blocks = view(blocks, gates, units, cols);
        if (!blocks) a.weight = {given(weight, transposed_size(3, units, cols), "weight"), 3, units, cols};
        const uint32_t rows = rows32(x.shape(0));
        if (!events) a.dense = x.data();
        a.bias = bias.data();
        a.out = out.data();
        a.stride = out.shape(1);
        const nb::gil_scoped_release release;
        sparsefold::input_product(*team, table.of(Real()), a, x.data(), rows, cols);
    }

    template <class Real>
    void input_gradient(const Blocks<Real>& blocks, In<Real> g, Out<Real> out) const {
        if (g.ndim() != 2 || out.ndim() != 2 || out.shape(0) != g.shape(0) || !blocks.packed())
            throw std::invalid_argument("a gradient of x reads and writes rows, by packed blocks.");
        InputGradientArgs<Real> a{};
        a.blocks = blocks.view();
        if (out.shape(1) != a.blocks.cols || g.shape(1) < size_t{a.blocks.gates} * a.blocks.units)
            throw std::invalid_argument("these are the blocks of another weight.");
        a.rows = size32(g.shape(0), "rows");
        a.g = g.data();
        a.stride = g.shape(1);
        a.out = out.data();
        const nb::gil_scoped_release release;
        sparsefold::input_gradient(*team, table.of(Real()), a);
    }

    /// What both directions share; tape, u, o and y are written by the forward alone.
    template <class Real, class Tape>
    void fill(EgruArgs<Real>& a, nb::dict options, const In<Real>& hidden, const Blocks<Real>* blocks,
              const Blocks<Real>* blocks_n, bool every, const In<Real>& theta, const In<Real>& mask, const In<Real>& y0,
              const In<Real>& h0, const Tape& tape, const Tape& u, const Tape& y) const {
        if (u.ndim() != 3) throw std::invalid_argument("a sequence has three axes (time, batch, unit).");
        const size_t steps = u.shape(0), batch = u.shape(1), H = u.shape(2), all = steps * batch * H;
        a.steps = size32(steps, "time");
        a.batch = size32(batch, "batch");
        a.units = size32(H, "units");
        rows32(steps * batch);
        a.reset = one_of<Reset>(nb::cast<std::string>(options["reset"]), {"threshold", "output", "none"}, "reset");
        a.event = one_of<Event>(nb::cast<std::string>(options["event"]), {"threshold", "always", "smooth"}, "event");
        a.reset_after = nb::cast<bool>(options["reset_after"]);
        a.height = static_cast<Real>(nb::cast<double>(options["height"]));
        a.half_width = static_cast<Real>(nb::cast<double>(options["half_width"]));
        a.keep = static_cast<Real>(nb::cast<double>(options["keep"]));
        const uint32_t gates = a.reset_after ? 3 : 2;
        const Real* w = blocks ? nullptr : given(hidden, transposed_size(3, a.units, a.units), "weight_hh");
        a.hidden = {w, gates, a.units, a.units};
        a.hidden_n = {w ? w + transposed_size(2, a.units, a.units) : nullptr, 1, a.units, a.units};
        a.blocks = view(blocks, gates, a.units, a.units);
        a.blocks_n = a.reset_after ? BlockWeight<Real>{} : view(blocks_n, 1, a.units, a.units);
        if (!a.reset_after && (a.blocks.start != nullptr) != (a.blocks_n.start != nullptr))
            throw std::invalid_argument("weight_hh is packed in both parts or in none.");
        a.every = every;
        a.theta = given(theta, H, "threshold");
        a.mask = data(mask, all, "mask");
        a.y0 = given(y0, batch * H, "y0");
        a.h0 = given(h0, batch * H, "h0");
        a.tape = const_cast<Real*>(given(tape, 4 * all, "tape"));
        a.u = const_cast<Real*>(given(u, all, "u"));
        a.y = const_cast<Real*>(given(y, all, "y"));
    }

    template <class Real>
    void egru_forward(nb::dict options, In<Real> hidden, const Blocks<Real>* blocks, const Blocks<Real>* blocks_n,
                      bool every, In<Real> bias_n, In<Real> theta, In<Real> mask, In<Real> y0, In<Real> h0,
                      Out<Real> tape, Out<Real> u, Out<Real> o, Out<Real> y, Out<Real> h) const {
        EgruForwardArgs<Real> a{};
        fill<Real>(a, options, hidden, blocks, blocks_n, every, theta, mask, y0, h0, tape, u, y);
        a.o = data(o, static_cast<size_t>(a.steps) * a.batch * a.units, "o");
        a.bias_n = data(bias_n, a.units, "bias_n");
        a.h = given(h, static_cast<size_t>(a.batch) * a.units, "h");
        const nb::gil_scoped_release release;
        sparsefold::egru_forward(*team, table.of(Real()), a);
    }

    template <class Real>
    void egru_backward(nb::dict options, In<Real> hidden, const Blocks<Real>* blocks, const Blocks<Real>* blocks_n,
                       bool every, In<Real> theta, In<Real> mask, In<Real> y0, In<Real> h0, In<Real> tape, In<Real> u,
                       In<Real> y, In<Real> grad_y, In<Real> grad_u, In<Real> grad_o, In<Real> grad_y_n,
                       In<Real> grad_h_n, bool wants_y0, Out<Real> gates, Out<Real> dy, Out<Real> dh, Out<Real> dtheta,
                       Out<Real> dbias, Out<uint8_t> wild) const {
        EgruBackwardArgs<Real> a{};
        fill<Real>(a, options, hidden, blocks, blocks_n, every, theta, mask, y0, h0, tape, u, y);
        const size_t step = static_cast<size_t>(a.batch) * a.units, all = step * a.steps;
        a.grad_y = data(grad_y, all, "grad_y");
        a.grad_u = data(grad_u, all, "grad_u");
        a.grad_o = data(grad_o, all, "grad_o");
        a.grad_y_n = data(grad_y_n, step, "grad_y_n");
        a.grad_h_n = data(grad_h_n, step, "grad_h_n");
        a.wants_y0 = wants_y0;
        a.gates = given(gates, 4 * all, "gates");
        a.dy = given(dy, step, "dy");
        a.dh = given(dh, step, "dh");
        a.dtheta = given(dtheta, a.units, "dtheta");
        a.dbias = given(dbias, size_t{4} * a.units, "dbias");
        a.wild = given(wild, static_cast<size_t>(a.steps) * a.batch, "wild");
        const nb::gil_scoped_release release;
        sparsefold::egru_backward(*team, table.of(Real()), a);
    }

    template <class Real>
    void outer(In<Real> g, const std::vector<uint32_t>& parts, In<Real> head, In<Real> rest, In<Real> scale,
               In<uint8_t> wild, const Blocks<Real>* live, Out<Real> out) const {
        OuterArgs<Real> a{};
        if (g.ndim() != 2 || out.ndim() != 2 || parts.empty() || parts.size() > 3 || out.shape(0) % parts.size())
            throw std::invalid_argument("an outer product takes rows of one to three gates.");
        const uint32_t rows = rows32(g.shape(0)), cols = size32(out.shape(1), "inputs");
        a.gates = static_cast<uint32_t>(parts.size());
        a.units = size32(out.shape(0) / parts.size(), "units");
        a.g = g.data();
        a.stride = g.shape(1);
        for (size_t i = 0; i < parts.size(); ++i) {
            if (size_t{parts[i]} + a.units > a.stride) throw std::invalid_argument("a gate reaches over its row.");
            a.part[i] = parts[i];
        }
        a.out = out.data();
        if (live) {
            const BlockPattern* p = live->pattern.get();
            if (!p || p->gates != a.gates || p->units != a.units || p->cols != cols)
                throw std::invalid_argument("these are the blocks of another weight.");
            a.live = p->live.data();
        }
        SiftArgs<Real> x{};
        const size_t above = head.is_valid() ? head.size() / std::max<size_t>(cols, 1) : 0;
        if (above > rows) throw std::invalid_argument("an outer product has more rows of x than of gradients.");
        x.head = head.is_valid() ? head.data() : nullptr;
        x.head_rows = static_cast<uint32_t>(above);
        if (!rest.is_valid() || rest.size() < (rows - above) * cols) throw std::invalid_argument("x has too few rows.");
        x.rest = rest.data();
        x.scale = scale.is_valid() ? scale.data() : nullptr;
        if (x.scale) {
            if (scale.ndim() != 2 || scale.shape(0) != rows || scale.shape(1) < cols)
                throw std::invalid_argument("the scale of x has other rows.");
            x.scale_stride = scale.shape(1);
        }
        x.wild = data(wild, rows, "wild");
        const nb::gil_scoped_release release;
        sparsefold::outer(*team, table.of(Real()), a, x, rows, cols);
    }

    template <class Real>
    void outer_blocks(In<Real> g, const std::vector<uint32_t>& parts, In<Real> head, In<Real> rest, In<uint8_t> wild,
                      const Blocks<Real>& blocks, Out<Real> out) const {
        OuterBlocksArgs<Real> a{};
        if (!blocks.pattern) throw std::invalid_argument("nobody looked which blocks these are.");
        const BlockPattern& p = *blocks.pattern;
        if (g.ndim() != 2 || parts.size() != p.gates || p.gates > 4)
            throw std::invalid_argument("an outer product takes rows of one to four gates.");
        a.rows = size32(g.shape(0), "rows");
        a.gates = p.gates, a.units = p.units, a.cols = p.cols;
        a.g = g.data();
        a.stride = g.shape(1);
        for (size_t i = 0; i < parts.size(); ++i) {
            if (size_t{parts[i]} + a.units > a.stride) throw std::invalid_argument("a gate reaches over its row.");
            a.part[i] = parts[i];
        }
        const size_t above = head.is_valid() ? head.size() / std::max<size_t>(a.cols, 1) : 0;
        if (above > a.rows) throw std::invalid_argument("an outer product has more rows of x than of gradients.");
        a.head = head.is_valid() ? head.data() : nullptr;
        a.head_rows = static_cast<uint32_t>(above);
        if (!rest.is_valid() || rest.size() < (a.rows - above) * a.cols)
            throw std::invalid_argument("x has too few rows.");
        a.rest = rest.data();
        a.wild = data(wild, a.rows, "wild");
        a.out = given(out, size_t{a.gates} * a.units * a.cols, "out");
        const nb::gil_scoped_release release;
        sparsefold::outer_blocks(*team, table.of(Real()), a, p);
    }

    /// What both directions of a cell with a dense state share.
    template <class Real, class Tape>
    void fill(GatedArgs<Real>& a, const std::string& kind, double keep_h, double keep_c, const In<Real>& weight,
              const Blocks<Real>* blocks, const Blocks<Real>* blocks_n, const In<Real>& mask_h, const In<Real>& mask_c,
              const In<Real>& h0, const In<Real>& c0, const In<int32_t>& live, const Tape& tape, const Tape& out,
              const Tape& cells) const {
        const char* const kinds[] = {"gru", "gru_before", "lstm", "tanh", "relu"};
        const auto* const found = std::find(std::begin(kinds), std::end(kinds), kind);
        if (found == std::end(kinds)) throw std::invalid_argument("'" + kind + "' is no kind of cell.");
        if (out.ndim() != 3) throw std::invalid_argument("a sequence has three axes (time, batch, unit).");
        a.kind = static_cast<Gated>(found - std::begin(kinds));
        const size_t steps = out.shape(0), batch = out.shape(1), H = out.shape(2), all = steps * batch * H;
        const bool pair = a.kind == Gated::lstm;
        a.steps = size32(steps, "time");
        a.batch = size32(batch, "batch");
        a.units = size32(H, "units");
        size32(steps * batch, "time x batch");
        size32(4 * H, "gates x units");
        a.keep_h = static_cast<Real>(keep_h);
        a.keep_c = static_cast<Real>(keep_c);
        a.weight = given(weight, gates_of(a.kind) * H * H, "weight_hh");
        const bool before = a.kind == Gated::gru_before;
        a.blocks = view(blocks, before ? 2 : gates_of(a.kind), H, H);
        a.blocks_n = view(before ? blocks_n : nullptr, 1, H, H);
        if (before && (a.blocks.start != nullptr) != (a.blocks_n.start != nullptr))
            throw std::invalid_argument("weight_hh is packed in both parts or in none.");
        a.mask_h = data(mask_h, all, "mask_h");
        a.mask_c = data(mask_c, all, "mask_c");
        a.h0 = given(h0, batch * H, "h0");
        a.c0 = pair ? given(c0, batch * H, "c0") : nullptr;
        a.live = data(live, steps, "live");
        for (size_t t = 0; a.live && t < steps; ++t)
            if (a.live[t] < 0 || static_cast<size_t>(a.live[t]) > batch)
                throw std::invalid_argument("live samples are between none and all.");
        a.tape = const_cast<Real*>(given(tape, tape_of(a.kind) * all, "tape"));
        a.out = const_cast<Real*>(given(out, all, "out"));
        a.cells = const_cast<Real*>(pair ? given(cells, all, "cells") : nullptr);
    }

    template <class Real>
    void gated_forward(const std::string& kind, double keep_h, double keep_c, In<Real> weight,
                       const Blocks<Real>* blocks, const Blocks<Real>* blocks_n, In<Real> bias_n, In<Real> mask_h,
                       In<Real> mask_c, In<Real> h0, In<Real> c0, In<int32_t> live, Out<Real> tape, Out<Real> out,
                       Out<Real> cells) const {
        GatedForwardArgs<Real> a{};
        fill<Real>(a, kind, keep_h, keep_c, weight, blocks, blocks_n, mask_h, mask_c, h0, c0, live, tape, out, cells);
        a.bias_n = data(bias_n, a.units, "bias_n");
        const nb::gil_scoped_release release;
        sparsefold::gated_forward(*team, table.of(Real()), a);
    }

    template <class Real>
    void gated_backward(const std::string& kind, double keep_h, double keep_c, In<Real> weight,
                        const Blocks<Real>* blocks, const Blocks<Real>* blocks_n, In<Real> mask_h, In<Real> mask_c,
                        In<Real> h0, In<Real> c0, In<int32_t> live, In<Real> tape, In<Real> out, In<Real> cells,
                        In<Real> grad_out, In<Real> grad_cells, In<Real> grad_h_n, In<Real> grad_c_n, Out<Real> gates,
                        Out<Real> dh, Out<Real> dc, Out<Real> dbias) const {
        GatedBackwardArgs<Real> a{};
        fill<Real>(a, kind, keep_h, keep_c, weight, blocks, blocks_n, mask_h, mask_c, h0, c0, live, tape, out, cells);
        const size_t step = static_cast<size_t>(a.batch) * a.units, all = step * a.steps;
        a.grad_out = data(grad_out, all, "grad_out");
        a.grad_cells = data(grad_cells, all, "grad_cells");
        a.grad_h_n = data(grad_h_n, step, "grad_h_n");
        a.grad_c_n = data(grad_c_n, step, "grad_c_n");
        a.gates = given(gates, tape_of(a.kind) * all, "gates");
        a.dh = given(dh, step, "dh");
        a.dc = a.kind == Gated::lstm ? given(dc, step, "dc") : nullptr;
        a.dbias = given(dbias, size_t{tape_of(a.kind)} * a.units, "dbias");
        const nb::gil_scoped_release release;
        sparsefold::gated_backward(*team, table.of(Real()), a);
    }
};

template <class Real>
void bind_blocks(nb::module_& m, const char* name) {
    nb::class_<Blocks<Real>>(m, name).def_prop_ro("packed", &Blocks<Real>::packed);
}

template <class Real>
void bind_real(nb::class_<PyTeam>& c) {
    c.def("advise", &PyTeam::advise<Real>, "x"_a)
        .def("count", &PyTeam::count<Real>, "x"_a)
        .def("transpose", &PyTeam::transpose<Real>, "weight"_a, "gates"_a, "out"_a)
        .def("pack", &PyTeam::pack<Real>, "weight"_a, "gates"_a, "most"_a, "previous"_a.none(), "kept"_a.none())
        .def("input_product", &PyTeam::input_product<Real>, "weight"_a.none(), "blocks"_a.none(), "bias"_a, "x"_a,
             "events"_a, "out"_a)
        .def("input_gradient", &PyTeam::input_gradient<Real>, "blocks"_a, "g"_a, "out"_a)
        .def("egru_forward", &PyTeam::egru_forward<Real>, "options"_a, "hidden"_a.none(), "blocks"_a.none(),
             "blocks_n"_a.none(), "every"_a, "bias_n"_a.none(), "theta"_a, "mask"_a.none(), "y0"_a, "h0"_a, "tape"_a,
             "u"_a, "o"_a.none(), "y"_a, "h"_a)
        .def("egru_backward", &PyTeam::egru_backward<Real>, "options"_a, "hidden"_a.none(), "blocks"_a.none(),
             "blocks_n"_a.none(), "every"_a, "theta"_a, "mask"_a.none(), "y0"_a, "h0"_a, "tape"_a, "u"_a, "y"_a,
             "grad_y"_a.none(), "grad_u"_a.none(), "grad_o"_a.none(), "grad_y_n"_a.none(), "grad_h_n"_a.none(),
             "wants_y0"_a, "gates"_a, "dy"_a, "dh"_a, "dtheta"_a, "dbias"_a, "wild"_a)
        .def("outer", &PyTeam::outer<Real>, "g"_a, "parts"_a, "head"_a.none(), "rest"_a, "scale"_a.none(),
             "wild"_a.none(), "live"_a.none(), "out"_a)
        .def("outer_blocks", &PyTeam::outer_blocks<Real>, "g"_a, "parts"_a, "head"_a.none(), "rest"_a, "wild"_a.none(),
             "blocks"_a, "out"_a)
        .def("gated_forward", &PyTeam::gated_forward<Real>, "kind"_a, "keep_h"_a, "keep_c"_a, "weight"_a,
             "blocks"_a.none(), "blocks_n"_a.none(), "bias_n"_a.none(), "mask_h"_a.none(), "mask_c"_a.none(), "h0"_a,
             "c0"_a.none(), "live"_a.none(), "tape"_a, "out"_a, "cells"_a.none())
        .def("gated_backward", &PyTeam::gated_backward<Real>, "kind"_a, "keep_h"_a, "keep_c"_a, "weight"_a,
             "blocks"_a.none(), "blocks_n"_a.none(), "mask_h"_a.none(), "mask_c"_a.none(), "h0"_a, "c0"_a.none(),
             "live"_a.none(), "tape"_a, "out"_a, "cells"_a.none(), "grad_out"_a.none(), "grad_cells"_a.none(),
             "grad_h_n"_a.none(), "grad_c_n"_a.none(), "gates"_a, "dh"_a, "dc"_a.none(), "dbias"_a);
}

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<KeptBlocks>(m, "KeptBlocks").def(nb::init<In<uint8_t>, uint32_t>(), "mask"_a, "gates"_a);
    bind_blocks<float>(m, "BlocksF32");
    bind_blocks<double>(m, "BlocksF64");
    nb::class_<PyTeam> team(m, "Team");
    team.def(nb::init<size_t, const std::string&, bool>(), "threads"_a, "isa"_a = "", "runtime"_a = true)
        .def_prop_ro("isa", [](const PyTeam& t) { return t.isa; })
        .def_prop_ro(
            "borrows", [](const PyTeam& t) { return t.team->borrows(); },
            "Whether its threads are those of the OpenMP runtime that is loaded.");
    bind_real<float>(team);
    bind_real<double>(team);
}

}  // namespace sparsefold
