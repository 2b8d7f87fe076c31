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

template <class T>
T one_of(const std::string& word, const char* const (&words)[3], const char* name) {
    for (uint32_t i = 0; i < 3; ++i)
        if (word == words[i]) return static_cast<T>(i);
    throw std::invalid_argument(std::string(name) + " '" + word + "' is not one of " + words[0] + ", " + words[1] +
                                ", " + words[2] + ".");
}

struct PyTeam {
    std::unique_ptr<Team, Team::Delete> team;
    std::string isa;
    SequenceKernels<float> f32;
    SequenceKernels<double> f64;

    PyTeam(size_t threads, const std::string& wanted)
        : f32(sparsefold::kernels(wanted, &isa)), f64(sparsefold::kernels(wanted)) {
        if (threads < 1 || threads > Team::kMost)
            throw std::invalid_argument("a sequence is divided between 1 and " + std::to_string(Team::kMost) +
                                        " threads, got " + std::to_string(threads) + ".");
        team.reset(new Team(threads));
    }
    const SequenceKernels<float>& kernels(float) const { return f32; }
    const SequenceKernels<double>& kernels(double) const { return f64; }

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
        return sparsefold::transpose(*team, kernels(Real()), args);
    }

    template <class Real>
    void input_product(In<Real> weight, In<Real> bias, In<Real> x, Out<Real> out) const {
        if (x.ndim() != 2 || out.ndim() != 2 || out.shape(0) != x.shape(0) || bias.size() % 3)
            throw std::invalid_argument("an input product reads (rows, inputs) and writes as many rows.");
        const uint32_t units = size32(bias.size() / 3, "units"), cols = size32(x.shape(1), "inputs");
        if (out.shape(1) < bias.size()) throw std::invalid_argument("the rows of an input product are too short.");
        const Transposed<Real> w{given(weight, transposed_size(3, units, cols), "weight"), 3, units, cols};
        const uint32_t rows = size32(x.shape(0), "rows");
        const nb::gil_scoped_release release;
        sparsefold::input_product(*team, kernels(Real()), w, x.data(), rows, bias.data(), out.data(), out.shape(1));
    }

    /// What both directions share; tape, u, o and y are written by the forward alone.
    template <class Real, class Tape>
    void fill(EgruArgs<Real>& a, nb::dict options, const In<Real>& hidden, bool every, const In<Real>& theta,
              const In<Real>& mask, const In<Real>& y0, const In<Real>& h0, const Tape& tape, const Tape& u,
              const Tape& o, const Tape& y) const {
        if (u.ndim() != 3) throw std::invalid_argument("a sequence has three axes (time, batch, unit).");
        const size_t steps = u.shape(0), batch = u.shape(1), H = u.shape(2), all = steps * batch * H;
        a.steps = size32(steps, "time");
        a.batch = size32(batch, "batch");
        a.units = size32(H, "units");
        size32(steps * batch, "time x batch");
        a.reset = one_of<Reset>(nb::cast<std::string>(options["reset"]), {"threshold", "output", "none"}, "reset");
        a.event = one_of<Event>(nb::cast<std::string>(options["event"]), {"threshold", "always", "smooth"}, "event");
        a.reset_after = nb::cast<bool>(options["reset_after"]);
        a.height = static_cast<Real>(nb::cast<double>(options["height"]));
        a.half_width = static_cast<Real>(nb::cast<double>(options["half_width"]));
        a.keep = static_cast<Real>(nb::cast<double>(options["keep"]));
        const Real* w = given(hidden, transposed_size(3, a.units, a.units), "weight_hh");
        a.hidden = {w, a.reset_after ? 3u : 2u, a.units, a.units};
        a.hidden_n = {w + transposed_size(2, a.units, a.units), 1, a.units, a.units};
        a.every = every;
        a.theta = given(theta, H, "threshold");
        a.mask = data(mask, all, "mask");
        a.y0 = given(y0, batch * H, "y0");
        a.h0 = given(h0, batch * H, "h0");
        a.tape = const_cast<Real*>(given(tape, 4 * all, "tape"));
        a.u = const_cast<Real*>(given(u, all, "u"));
        a.o = const_cast<Real*>(given(o, all, "o"));
        a.y = const_cast<Real*>(given(y, all, "y"));
    }

    template <class Real>
    void egru_forward(nb::dict options, In<Real> hidden, bool every, In<Real> bias_n, In<Real> theta, In<Real> mask,
                      In<Real> y0, In<Real> h0, Out<Real> tape, Out<Real> u, Out<Real> o, Out<Real> y,
                      Out<Real> h) const {
        EgruForwardArgs<Real> a{};
        fill<Real>(a, options, hidden, every, theta, mask, y0, h0, tape, u, o, y);
        a.bias_n = data(bias_n, a.units, "bias_n");
        a.h = given(h, static_cast<size_t>(a.batch) * a.units, "h");
        const nb::gil_scoped_release release;
        sparsefold::egru_forward(*team, kernels(Real()), a);
    }

    template <class Real>
    void egru_backward(nb::dict options, In<Real> hidden, bool every, In<Real> theta, In<Real> mask, In<Real> y0,
                       In<Real> h0, In<Real> tape, In<Real> u, In<Real> o, In<Real> y, In<Real> grad_y, In<Real> grad_u,
                       In<Real> grad_o, In<Real> grad_y_n, In<Real> grad_h_n, bool wants_y0, Out<Real> gates,
                       Out<Real> dy, Out<Real> dh, Out<Real> dtheta, Out<Real> dbias, Out<uint8_t> wild) const {
        EgruBackwardArgs<Real> a{};
        fill<Real>(a, options, hidden, every, theta, mask, y0, h0, tape, u, o, y);
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
        sparsefold::egru_backward(*team, kernels(Real()), a);
    }

    template <class Real>
    void outer(In<Real> g, const std::vector<uint32_t>& parts, In<Real> head, In<Real> rest, In<Real> scale,
               In<uint8_t> wild, Out<Real> out) const {
        OuterArgs<Real> a{};
        if (g.ndim() != 2 || out.ndim() != 2 || parts.empty() || parts.size() > 3 || out.shape(0) % parts.size())
            throw std::invalid_argument("an outer product takes rows of one to three gates.");
        a.rows = size32(g.shape(0), "rows");
        a.gates = static_cast<uint32_t>(parts.size());
        a.units = size32(out.shape(0) / parts.size(), "units");
        a.cols = size32(out.shape(1), "inputs");
        a.g = g.data();
        a.stride = g.shape(1);
        for (size_t i = 0; i < parts.size(); ++i) {
            if (size_t{parts[i]} + a.units > a.stride) throw std::invalid_argument("a gate reaches over its row.");
            a.part[i] = parts[i];
        }
        a.out = out.data();
        Columns<Real> x{};
        const size_t above = head.is_valid() ? head.size() / std::max<size_t>(a.cols, 1) : 0;
        if (above > a.rows) throw std::invalid_argument("an outer product has more rows of x than of gradients.");
        x.head = head.is_valid() ? head.data() : nullptr;
        x.head_rows = static_cast<uint32_t>(above);
        const size_t below = (a.rows - above) * a.cols;
        if (!rest.is_valid() || rest.size() < below) throw std::invalid_argument("x has too few rows.");
        x.rest = rest.data();
        x.scale = scale.is_valid() ? scale.data() : nullptr;
        if (x.scale) {
            if (scale.ndim() != 2 || scale.shape(0) != a.rows || scale.shape(1) < a.cols)
                throw std::invalid_argument("the scale of x has other rows.");
            x.scale_stride = scale.shape(1);
        }
        x.wild = data(wild, a.rows, "wild");
        const nb::gil_scoped_release release;
        sparsefold::outer(*team, kernels(Real()), a, x);
    }

    /// What both directions of a cell with a dense state share.
    template <class Real, class Tape>
    void fill(GatedArgs<Real>& a, const std::string& kind, double keep_h, double keep_c, const In<Real>& weight,
              const In<Real>& mask_h, const In<Real>& mask_c, const In<Real>& h0, const In<Real>& c0,
              const In<int32_t>& live, const Tape& tape, const Tape& out, const Tape& cells) const {
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
    void gated_forward(const std::string& kind, double keep_h, double keep_c, In<Real> weight, In<Real> bias_n,
                       In<Real> mask_h, In<Real> mask_c, In<Real> h0, In<Real> c0, In<int32_t> live, Out<Real> tape,
                       Out<Real> out, Out<Real> cells) const {
        GatedForwardArgs<Real> a{};
        fill<Real>(a, kind, keep_h, keep_c, weight, mask_h, mask_c, h0, c0, live, tape, out, cells);
        a.bias_n = data(bias_n, a.units, "bias_n");
        const nb::gil_scoped_release release;
        sparsefold::gated_forward(*team, kernels(Real()), a);
    }

    template <class Real>
    void gated_backward(const std::string& kind, double keep_h, double keep_c, In<Real> weight, In<Real> mask_h,
                        In<Real> mask_c, In<Real> h0, In<Real> c0, In<int32_t> live, In<Real> tape, In<Real> out,
                        In<Real> cells, In<Real> grad_out, In<Real> grad_cells, In<Real> grad_h_n, In<Real> grad_c_n,
                        Out<Real> gates, Out<Real> dh, Out<Real> dc, Out<Real> dbias) const {
        GatedBackwardArgs<Real> a{};
        fill<Real>(a, kind, keep_h, keep_c, weight, mask_h, mask_c, h0, c0, live, tape, out, cells);
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
        sparsefold::gated_backward(*team, kernels(Real()), a);
    }
};

template <class Real>
void bind_real(nb::class_<PyTeam>& c) {
    c.def("advise", &PyTeam::advise<Real>, "x"_a)
        .def("count", &PyTeam::count<Real>, "x"_a)
        .def("transpose", &PyTeam::transpose<Real>, "weight"_a, "gates"_a, "out"_a)
        .def("input_product", &PyTeam::input_product<Real>, "weight"_a, "bias"_a, "x"_a, "out"_a)
        .def("egru_forward", &PyTeam::egru_forward<Real>, "options"_a, "hidden"_a, "every"_a, "bias_n"_a.none(),
             "theta"_a, "mask"_a.none(), "y0"_a, "h0"_a, "tape"_a, "u"_a, "o"_a, "y"_a, "h"_a)
        .def("egru_backward", &PyTeam::egru_backward<Real>, "options"_a, "hidden"_a, "every"_a, "theta"_a,
             "mask"_a.none(), "y0"_a, "h0"_a, "tape"_a, "u"_a, "o"_a, "y"_a, "grad_y"_a.none(), "grad_u"_a.none(),
             "grad_o"_a.none(), "grad_y_n"_a.none(), "grad_h_n"_a.none(), "wants_y0"_a, "gates"_a, "dy"_a, "dh"_a,
             "dtheta"_a, "dbias"_a, "wild"_a)
        .def("outer", &PyTeam::outer<Real>, "g"_a, "parts"_a, "head"_a.none(), "rest"_a, "scale"_a.none(),
             "wild"_a.none(), "out"_a)
        .def("gated_forward", &PyTeam::gated_forward<Real>, "kind"_a, "keep_h"_a, "keep_c"_a, "weight"_a,
             "bias_n"_a.none(), "mask_h"_a.none(), "mask_c"_a.none(), "h0"_a, "c0"_a.none(), "live"_a.none(), "tape"_a,
             "out"_a, "cells"_a.none())
        .def("gated_backward", &PyTeam::gated_backward<Real>, "kind"_a, "keep_h"_a, "keep_c"_a, "weight"_a,
             "mask_h"_a.none(), "mask_c"_a.none(), "h0"_a, "c0"_a.none(), "live"_a.none(), "tape"_a, "out"_a,
             "cells"_a.none(), "grad_out"_a.none(), "grad_cells"_a.none(), "grad_h_n"_a.none(), "grad_c_n"_a.none(),
             "gates"_a, "dh"_a, "dc"_a.none(), "dbias"_a);
}

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<PyTeam> team(m, "Team");
    team.def(nb::init<size_t, const std::string&>(), "threads"_a, "isa"_a = "").def_prop_ro("isa", [](const PyTeam& t) {
        return t.isa;
    });
    bind_real<float>(team);
    bind_real<double>(team);
}

}  // namespace sparsefold
