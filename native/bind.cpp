// The engine for Python; bind_train.cpp is its training side, and no other file knows Python.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "engine.hpp"

namespace nb = nanobind;
using namespace nb::literals;

namespace sparsefold {
namespace {

template <class T, size_t N>
using Array = nb::ndarray<const T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Vector = Array<float, 1>;

std::string plural(uint64_t n, const char* noun) { return std::to_string(n) + " " + noun + (n == 1 ? "" : "s"); }

uint32_t size32(size_t n) {
    if (n > (1u << 28))
        throw std::invalid_argument("an axis of " + std::to_string(n) + " elements is longer than 2^28.");
    return static_cast<uint32_t>(n);
}

/// A matrix of the file format, keeping the arrays it borrows alive.
struct PyMatrix {
    MatrixView view;
    nb::object values, index, start, scale;

    static PyMatrix dense(Array<float, 2> values, uint32_t gates) {
        PyMatrix m;
        m.view.format = MatrixView::Format::dense;
        m.view.rows = size32(values.shape(0));
        m.view.cols = size32(values.shape(1));
        m.view.gates = gates;
        m.view.values = values.data();
        m.values = nb::find(values);
        return m;
    }

    static PyMatrix block(uint32_t rows, uint32_t cols, uint32_t gates, Array<float, 3> values,
                          Array<uint32_t, 1> block_row, Array<uint32_t, 1> start) {
        PyMatrix m;
        m.view.format = MatrixView::Format::block;
        m.view.rows = size32(rows);
        m.view.cols = size32(cols);
        m.view.gates = gates;
        m.view.blocks = values.shape(0);
        m.view.block_cols = size32(values.shape(1));
        m.view.block_rows = size32(values.shape(2));
        if (m.view.block_cols == 0 || m.view.block_rows == 0)
            throw std::invalid_argument("a block has at least one element.");
        const size_t columns = (size_t{cols} + m.view.block_cols - 1) / m.view.block_cols;
        if (block_row.shape(0) != values.shape(0) || start.shape(0) != columns + 1)
            throw std::invalid_argument("a block matrix of " + plural(values.shape(0), "block") + " and " +
                                        plural(columns, "block column") + " came with " +
                                        plural(block_row.shape(0), "block row") + " and " +
                                        plural(start.shape(0), "start") + ".");
        m.view.values = values.data();
        m.view.block_row = block_row.data();
        m.view.start = start.data();
        m.values = nb::find(values);
        m.index = nb::find(block_row);
        m.start = nb::find(start);
        return m;
    }

    /// The same matrix, packed at another precision; `scale` (rows) for int8, empty otherwise.
    void set_precision(const std::string& precision, Vector row_scale) {
        using P = MatrixView::Precision;
        const P found = precision == "bf16"   ? P::bf16
                        : precision == "i8"   ? P::i8
                        : precision == "w8a8" ? P::w8a8
                                              : P::f32;
        const bool i8 = found == P::i8 || found == P::w8a8;
        if (found == P::f32 && precision != "f32")
            throw std::invalid_argument("precision '" + precision + "' is not one of f32, bf16, i8, w8a8.");
        if (row_scale.shape(0) != (i8 ? view.rows : 0))
            throw std::invalid_argument("int8 weights need one scale for each row, others none.");
        view.precision = found;
        view.scale = row_scale.data();
        scale = nb::find(row_scale);
    }

    static PyMatrix complementary(uint32_t rows, uint32_t gates, uint32_t overlay, Array<float, 3> values,
                                  Array<uint8_t, 3> live) {
        PyMatrix m;
        m.view.format = MatrixView::Format::complementary;
        m.view.rows = size32(rows);
        m.view.cols = size32(values.shape(0));
        m.view.gates = gates;
        m.view.overlay = overlay;
        const size_t units = gates ? rows / gates : 0, sets = overlay ? (units + overlay - 1) / overlay : 0;
        for (size_t axis = 0; axis < 3; ++axis)
            if (values.shape(axis) != live.shape(axis) || (axis == 1 && values.shape(1) != gates) ||
                (axis == 2 && values.shape(2) != sets))
                throw std::invalid_argument(
                    "a complementary matrix stores (columns, gates, sets) values and as many rows.");
        m.view.values = values.data();
        m.view.live = live.data();
        m.values = nb::find(values);
        m.index = nb::find(live);
        return m;
    }
};

/// A packed matrix by itself, for tests and benchmarks of one kernel: as it is packed for event lists and for dense x.
struct PyPacked {
    Matrix matrix, for_dense;  // w8a8 has no form for events: both are the same
    mutable std::vector<int8_t> codes;
    mutable std::vector<float> before;
    const Kernels* kernels;

    PyPacked(const PyMatrix& m, const std::string& isa)
        : matrix(m.view,
                 m.view.precision == MatrixView::Precision::w8a8 ? Matrix::Reads::dense : Matrix::Reads::events),
          for_dense(m.view, Matrix::Reads::dense),
          codes(for_dense.code_bytes()),
          before(matrix.padded_rows()),
          kernels(&sparsefold::kernels(isa)) {}

    void check(size_t x, size_t limit, size_t out) const {
        if (x != limit || out != matrix.padded_rows())
            throw std::invalid_argument("this product reads " + plural(limit, "value") + " and adds to " +
                                        plural(matrix.padded_rows(), "padded row") + "; it was given " +
                                        std::to_string(x) + " and " + std::to_string(out) + ".");
    }
    void matvec(Vector x, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out, uint32_t repeat) const {
        check(x.shape(0), matrix.cols(), out.shape(0));
        nb::gil_scoped_release release;
        for (uint32_t i = 0; i < repeat; ++i)
            for_dense.matvec(*kernels, x.data(), kept(out.data()), out.data(), codes.data());
    }
    void matvec_events(Array<uint32_t, 1> index, Vector value,
                       nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) const {
        const uint32_t whole[] = {0, size32(index.shape(0))};
        play_lists(index, value, whole, 1, out);
    }
    /// Many event lists one after the other, without Python in between: list k is events [start[k], start[k + 1]).
    void matvec_lists(Array<uint32_t, 1> index, Vector value, Array<uint32_t, 1> start,
                      nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) const {
        for (size_t k = 0; k + 1 < start.shape(0); ++k)
            if (start(k) > start(k + 1) || start(k + 1) > index.shape(0))
                throw std::invalid_argument("the lists' starts must rise and stay within the events.");
        play_lists(index, value, start.data(), start.shape(0) ? start.shape(0) - 1 : 0, out);
    }

  private:
    void play_lists(const Array<uint32_t, 1>& index, const Vector& value, const uint32_t* start, size_t lists,
                    nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& out) const {
        check(value.shape(0), index.shape(0), out.shape(0));
        if (!codes.empty()) throw std::invalid_argument("a w8a8 product reads dense x; event lists take i8 weights.");
        for (size_t k = 0; k < index.shape(0); ++k)
            if (index(k) >= matrix.cols())
                throw std::invalid_argument("event of input " + std::to_string(index(k)) + " in a matrix of " +
                                            plural(matrix.cols(), "column") + ".");
        nb::gil_scoped_release release;
        for (size_t k = 0; k < lists; ++k)
            matrix.matvec(*kernels, Events{index.data() + start[k], value.data() + start[k], start[k + 1] - start[k]},
                          kept(out.data()), out.data());
    }
    /// What the product is added to, where it does not write.
    const float* kept(const float* out) const {
        std::memcpy(before.data(), out, before.size() * sizeof(float));
        return before.data();
    }
};

class PyStream;

struct PyEngine {
    Program program;
    std::shared_ptr<const Engine> engine;
    Crew::Pointer crew;

    PyEngine() = default;
    PyEngine(const PyEngine&) = delete;

    const float* vector(const Vector& v, size_t size, const char* what) {
        if (v.shape(0) != size)
            throw std::invalid_argument(std::string(what) + " has " + plural(v.shape(0), "value") + ", expected " +
                                        std::to_string(size) + ".");
        return v.data();
    }
    void open() const {
        if (engine) throw std::invalid_argument("this engine is finished; ops can no longer be added.");
    }
    void add_embedding(Array<float, 2> weight) {
        open();
        program.add_embedding(weight.data(), size32(weight.shape(0)), size32(weight.shape(1)));
    }
    void add_linear(const PyMatrix& weight, Vector bias) {
        open();
        program.add_linear(weight.view, vector(bias, weight.view.rows, "bias"));
    }
    void add_conv1d(const PyMatrix& weight, Vector bias, uint32_t kernel, uint32_t dilation, uint32_t groups) {
        open();
        program.add_conv1d(weight.view, vector(bias, weight.view.rows, "bias"), kernel, dilation, groups);
    }
    void add_gru(const PyMatrix& ih, const PyMatrix& hh, Vector bias_ih, Vector bias_hh, bool reset_after,
                 float delta_input, float delta_hidden, bool reverse) {
        open();
        program.add_gru(ih.view, hh.view, vector(bias_ih, ih.view.rows, "bias_ih"),
                        vector(bias_hh, hh.view.rows, "bias_hh"), reset_after, {delta_input, delta_hidden}, reverse);
    }
    void add_egru(const PyMatrix& ih, const PyMatrix& hh, Vector bias_ih, Vector bias_hh, Vector threshold,
                  bool reset_after, const std::string& reset, bool always, bool emits_events, float zoneout,
                  bool reverse) {
        open();
        const Reset kind = reset == "threshold" ? Reset::threshold : reset == "output" ? Reset::output : Reset::none;
        if (kind == Reset::none && reset != "none")
            throw std::invalid_argument("reset '" + reset + "' is not one of threshold, output, none.");
        program.add_egru(ih.view, hh.view, vector(bias_ih, ih.view.rows, "bias_ih"),
                         vector(bias_hh, hh.view.rows, "bias_hh"), vector(threshold, hh.view.cols, "threshold"),
                         reset_after, kind, always, emits_events, zoneout, reverse);
    }
    void add_lstm(const PyMatrix& ih, const PyMatrix& hh, Vector bias_ih, Vector bias_hh, float delta_input,
                  float delta_hidden, bool reverse) {
        open();
        program.add_lstm(ih.view, hh.view, vector(bias_ih, ih.view.rows, "bias_ih"),
                         vector(bias_hh, hh.view.rows, "bias_hh"), {delta_input, delta_hidden}, reverse);
    }
    void add_rnn(const PyMatrix& ih, const PyMatrix& hh, Vector bias_ih, Vector bias_hh, bool relu, float delta_input,
                 float delta_hidden, bool reverse) {
        open();
        program.add_rnn(ih.view, hh.view, vector(bias_ih, ih.view.rows, "bias_ih"),
                        vector(bias_hh, hh.view.rows, "bias_hh"), relu, {delta_input, delta_hidden}, reverse);
    }
    void add_relu() {
        open();
        program.add_relu();
    }
    void add_events(uint32_t units) {
        open();
        program.add_events(units);
    }
    void add_kwta(uint32_t units, uint32_t k, uint32_t groups) {
        open();
        program.add_kwta(units, k, groups);
    }
    void add_log_softmax(uint32_t units) {
        open();
        program.add_log_softmax(units);
    }
    void add_top_k(uint32_t units, uint32_t k) {
        open();
        program.add_top_k(units, k);
    }
    void add_cluster(const PyMatrix& projection, const PyMatrix& weight, Vector bias, uint32_t units, uint32_t at) {
        open();
        program.add_cluster(projection.view, weight.view, vector(bias, weight.view.rows, "bias"), units, at);
    }
    void add_layer_norm(Vector weight, Vector bias, float epsilon) {
        open();
        const uint32_t units = size32(weight.shape(0));
        program.add_layer_norm(weight.data(), vector(bias, units, "bias"), units, epsilon);
    }
    void finish(const std::string& isa, uint64_t fold_limit, size_t threads) {
        open();
        if (program.ops().empty()) throw std::invalid_argument("a program needs at least one op.");
        if (threads < 1 || threads > Crew::kMost)
            throw std::invalid_argument("a batch is divided between 1 and " + std::to_string(Crew::kMost) +
                                        " threads, got " + std::to_string(threads) + ".");
        crew.reset(new Crew(threads));
        engine = std::make_shared<const Engine>(std::move(program), isa, fold_limit);
        engine->set_threads(threads);
    }
    void step_batch_tokens(const std::vector<PyStream*>& streams, Array<int64_t, 1> tokens,
                           nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) const;
    void step_batch_values(const std::vector<PyStream*>& streams, Array<float, 2> x,
                           nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) const;
    void play_batch(const std::vector<PyStream*>& streams, const int64_t* tokens, const float* x, float* out) const;
    const Engine& get() const {
        if (!engine) throw std::invalid_argument("this engine is not finished.");
        return *engine;
    }
};

/// A contiguous float32 buffer of a Python object, by the buffer protocol: the cheapest crossing there is.
class FloatBuffer {
  public:
    FloatBuffer(nb::handle object, size_t size, const char* what, bool writable) {
        const int flags = PyBUF_ND | PyBUF_FORMAT | PyBUF_C_CONTIGUOUS | (writable ? PyBUF_WRITABLE : 0);
        if (PyObject_GetBuffer(object.ptr(), &view_, flags) != 0) {
            PyErr_Clear();
            fail(what, size, writable ? "not a writable contiguous array" : "not a contiguous array");
        }
        const bool is_float = view_.format && view_.format[0] == 'f' && view_.format[1] == 0;
        if (!is_float || view_.ndim != 1 || static_cast<size_t>(view_.shape[0]) != size) {
            std::string got = is_float ? "float32 of shape (" : "another type of shape (";
            for (int i = 0; i < view_.ndim; ++i) got += (i ? ", " : "") + std::to_string(view_.shape[i]);
            PyBuffer_Release(&view_);
            fail(what, size, got + ")");
        }
    }
    ~FloatBuffer() { PyBuffer_Release(&view_); }
    FloatBuffer(const FloatBuffer&) = delete;
    float* data() const { return static_cast<float*>(view_.buf); }

  private:
    [[noreturn]] static void fail(const char* what, size_t size, const std::string& got) {
        throw std::invalid_argument(std::string(what) + " must be float32 of shape (" + std::to_string(size) +
                                    ",); got " + got + ". Convert it with numpy.ascontiguousarray(x, numpy.float32).");
    }
    Py_buffer view_{};
};

/// For a step, of one stream or of many.
void check_steps(const Program& program) {
    if (program.whole_sequences())
        throw std::invalid_argument(
            "this program has a layer that reads backwards, so that it plays whole sequences, not one step. "
            "Pass the sequence to Stream.run().");
}

void check_token(const Program& program, int64_t token) {
    if (token < 0 || token >= static_cast<int64_t>(program.inputs()))
        throw std::invalid_argument("token " + std::to_string(token) +
                                    " is outside the vocabulary: this program knows tokens 0 to " +
                                    std::to_string(program.inputs() - 1) + ".");
}

/// For a score, of one step or of many.
void check_scores(const Program& program) {
    check_steps(program);
    if (!program.scores())
        throw std::invalid_argument(
            "a score needs a program whose last op is a linear, a log_softmax or a cluster, which gives a value for "
            "each "
            "class; this one ends in another. Compile it without that op.");
}

void check_target(const Program& program, int64_t target) {
    if (target < 0 || target >= static_cast<int64_t>(program.outputs()))
        throw std::invalid_argument("target " + std::to_string(target) +
                                    " is outside the outputs: this program gives values 0 to " +
                                    std::to_string(program.outputs() - 1) + ".");
}

class PyStream {
  public:
    explicit PyStream(const PyEngine& engine) : engine_(engine.engine), stream_((engine.get(), engine.engine)) {}

    void step(nb::handle x, nb::handle out) {
        const Program& program = engine_->program;
        check_steps(program);
        const FloatBuffer target(out, program.outputs(), "out", true);
        if (program.takes_tokens()) {
            run_one(token(x), nullptr, target.data());
        } else {
            const FloatBuffer source(x, program.inputs(), "x", false);
            run_one(0, source.data(), target.data());
        }
    }

    float score(nb::handle x, nb::handle target) {
        const Program& program = engine_->program;
        check_scores(program);
        const int64_t wanted = whole(target, "a target is a whole number", "target");
        check_target(program, wanted);
        if (program.takes_tokens()) return score_one(token(x), nullptr, wanted);
        const FloatBuffer source(x, program.inputs(), "x", false);
        return score_one(0, source.data(), wanted);
    }

    void score_tokens(Array<int64_t, 1> tokens, Array<int64_t, 1> targets,
                      nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        if (!engine_->program.takes_tokens()) throw std::invalid_argument("this program reads values, not tokens.");
        for (size_t t = 0; t < tokens.shape(0); ++t) check_token(tokens(t));
        score_all(tokens.shape(0), tokens.data(), nullptr, targets, out);
    }
    void score_values(Array<float, 2> x, Array<int64_t, 1> targets,
                      nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        if (engine_->program.takes_tokens() || x.shape(1) != engine_->program.inputs())
            throw std::invalid_argument("sequence does not fit the program's input.");
        score_all(x.shape(0), nullptr, x.data(), targets, out);
    }

    void run_tokens(Array<int64_t, 1> tokens, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out,
                    nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> trace) {
        if (!engine_->program.takes_tokens()) throw std::invalid_argument("this program reads values, not tokens.");
        for (size_t t = 0; t < tokens.shape(0); ++t) check_token(tokens(t));
        run(tokens.shape(0), tokens.data(), nullptr, out, trace);
    }
    void run_values(Array<float, 2> x, nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out,
                    nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu> trace) {
        if (engine_->program.takes_tokens() || x.shape(1) != engine_->program.inputs())
            throw std::invalid_argument("sequence does not fit the program's input.");
        run(x.shape(0), nullptr, x.data(), out, trace);
    }

    void reset() {
        const Lock lock(stream_);
        stream_.reset();
    }
    void reset_counters() {
        const Lock lock(stream_);
        stream_.reset_counters();
    }
    uint64_t steps() const { return stream_.steps(); }

    /// Copies one array of one op into `out`; float state or uint64 counters.
    void read(size_t op, const std::string& name, nb::ndarray<nb::ndim<1>, nb::c_contig, nb::device::cpu> out) {
        const Lock lock(stream_);
        const OpState& s = at(op);
        const auto copy = [&](const void* from, size_t size, nb::dlpack::dtype dtype) {
            if (!from || out.dtype() != dtype || out.shape(0) != size)
                throw std::invalid_argument("cannot read '" + name + "'.");
            std::memcpy(out.data(), from, out.nbytes());
        };
        const auto counters = [&](const std::vector<uint64_t>& c) { copy(c.data(), c.size(), nb::dtype<uint64_t>()); };
        if (name == "h") return copy(s.cell.h, s.cell.units, nb::dtype<float>());
        if (name == "c") return copy(s.cell.c, s.cell.units, nb::dtype<float>());
        if (name == "y") return copy(s.cell.y, s.cell.units, nb::dtype<float>());
        if (name == "u") return copy(s.cell.u, s.cell.units, nb::dtype<float>());
        if (const Carried c = stream_.changes(op, name); c.at) {
            std::vector<float> values(c.size());
            c.read(values.data());
            return copy(values.data(), values.size(), nb::dtype<float>());
        }
        if (name == "x" && stream_.history_size(op)) {
            if (out.dtype() != nb::dtype<float>() || out.shape(0) != stream_.history_size(op))
                throw std::invalid_argument("cannot read 'x'.");
            return stream_.history(op, static_cast<float*>(out.data()));
        }
        if (name == "events") return counters(s.events);
        if (name == "input_reads") return counters(s.input_reads);
        if (name == "hidden_reads") return counters(s.hidden_reads);
        if (name == "asked" && engine_->program.ops()[op].kind == Op::Kind::cluster)
            return copy(&s.asked, 1, nb::dtype<uint64_t>());
        throw std::invalid_argument("an op has no '" + name + "'.");
    }
    void write(size_t op, const std::string& name, Vector values) {
        const Lock lock(stream_);
        OpState& s = at(op);
        if (name == "x" && values.shape(0) && values.shape(0) == stream_.history_size(op))
            return stream_.set_history(op, values.data());
        const Carried changes = stream_.changes(op, name);
        const size_t size = changes.at ? changes.size() : s.cell.units;
        if (values.shape(0) != size || size == 0) throw std::invalid_argument("cannot write '" + name + "'.");
        if (changes.at)
            changes.write(values.data());
        else if (float* const state = name == "h" ? s.cell.h : name == "c" ? s.cell.c : nullptr)
            std::memcpy(state, values.data(), values.nbytes());
        else if (name == "y" && s.cell.u)  // of an EGRU; a ReLU's y is carried nowhere
            stream_.set_emitted(op, values.data());
        else
            throw std::invalid_argument("an op has no state '" + name + "'.");
    }
    size_t trace_width() const { return stream_.trace_width(); }

  private:
    /// Held while a step runs without the interpreter's lock.
    struct Lock {
        explicit Lock(Stream& s) : claim(s) {
            if (!claim)
                throw std::runtime_error(
                    "this stream is in use by another thread. Give each thread its own engine.stream().");
        }
        Claim claim;
    };

    OpState& at(size_t op) {
        if (op >= engine_->program.ops().size())
            throw std::invalid_argument("the program has no op " + std::to_string(op) + ".");
        return stream_.state(op);
    }
    void check_token(int64_t token) const { sparsefold::check_token(engine_->program, token); }
    static int64_t whole(nb::handle x, const char* wanted, const char* what) {
        PyObject* index = PyLong_CheckExact(x.ptr()) ? (Py_INCREF(x.ptr()), x.ptr()) : PyNumber_Index(x.ptr());
        if (!index) {
            PyErr_Clear();
            throw std::invalid_argument(std::string(wanted) + ", an int; got " +
                                        nb::cast<std::string>(nb::str(nb::handle(x).type().attr("__name__"))) + ".");
        }
        const long long value = PyLong_AsLongLong(index);
        Py_DECREF(index);
        if (value == -1 && PyErr_Occurred()) {
            PyErr_Clear();
            throw std::invalid_argument(std::string(what) + " does not fit 64 bits.");
        }
        return value;
    }
    int64_t token(nb::handle x) const {
        const int64_t value =
            whole(x, "this program starts with an embedding, so step() takes one token id", "token id");
        check_token(value);
        return value;
    }
    float score_one(int64_t token, const float* x, int64_t target) {
        const Lock lock(stream_);
        nb::gil_scoped_release release;
        return stream_.score(token, x, static_cast<uint32_t>(target));
    }
    void score_all(size_t steps, const int64_t* tokens, const float* x, const Array<int64_t, 1>& targets,
                   nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>& out) {
        check_scores(engine_->program);
        if (targets.shape(0) != steps || out.shape(0) != steps)
            throw std::invalid_argument("targets or output do not fit the sequence.");
        for (size_t t = 0; t < steps; ++t) check_target(engine_->program, targets(t));
        const Lock lock(stream_);
        nb::gil_scoped_release release;
        stream_.score(steps, tokens, x, targets.data(), out.data());
    }
    void run_one(int64_t token, const float* x, float* out) {
        const Lock lock(stream_);
        nb::gil_scoped_release release;
        stream_.step(token, x, out);
    }
    void run(size_t steps, const int64_t* tokens, const float* x,
             nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>& out,
             nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>& trace) {
        const bool traced = trace.shape(0) != 0;
        if (out.shape(0) != steps || out.shape(1) != engine_->program.outputs() ||
            (traced && (trace.shape(0) != steps || trace.shape(1) != stream_.trace_width())))
            throw std::invalid_argument("output or trace does not fit the sequence.");
        const Lock lock(stream_);
        nb::gil_scoped_release release;
        stream_.run(steps, tokens, x, out.data(), traced ? trace.data() : nullptr);
    }

    friend struct PyEngine;
    std::shared_ptr<const Engine> engine_;
    Stream stream_;
};

void PyEngine::step_batch_tokens(const std::vector<PyStream*>& streams, Array<int64_t, 1> tokens,
                                 nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) const {
    const Program& p = get().program;
    if (!p.takes_tokens() || tokens.shape(0) != streams.size() || out.shape(0) != streams.size() ||
        out.shape(1) != p.outputs())
        throw std::invalid_argument("the batch does not fit the program.");
    for (size_t s = 0; s < streams.size(); ++s) check_token(p, tokens(s));
    play_batch(streams, tokens.data(), nullptr, out.data());
}

void PyEngine::step_batch_values(const std::vector<PyStream*>& streams, Array<float, 2> x,
                                 nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu> out) const {
    const Program& p = get().program;
    if (p.takes_tokens() || x.shape(0) != streams.size() || x.shape(1) != p.inputs() ||
        out.shape(0) != streams.size() || out.shape(1) != p.outputs())
        throw std::invalid_argument("the batch does not fit the program.");
    play_batch(streams, nullptr, x.data(), out.data());
}

void PyEngine::play_batch(const std::vector<PyStream*>& streams, const int64_t* tokens, const float* x,
                          float* out) const {
    check_steps(get().program);
    for (size_t s = 0; s < streams.size(); ++s)
        if (!streams[s] || streams[s]->engine_ != engine)
            throw std::invalid_argument("stream " + std::to_string(s) +
                                        " of the batch is of another engine. A batch takes streams of the engine that "
                                        "plays it, made by its stream().");
    const auto stream = [&](size_t s) -> Stream& { return streams[s]->stream_; };
    const Claims claims(stream, streams.size());
    if (!claims) {
        const size_t refused = claims.refused();
        for (size_t s = 0; s < refused; ++s)
            if (streams[s] == streams[refused])
                throw std::invalid_argument("streams " + std::to_string(s) + " and " + std::to_string(refused) +
                                            " of the batch are the same one. A batch plays one step of each stream: "
                                            "name each once.");
        throw std::runtime_error("stream " + std::to_string(refused) +
                                 " of the batch is in use by another thread. Give each thread its own "
                                 "engine.stream().");
    }
    nb::gil_scoped_release release;
    crew->step_batch(stream, streams.size(), tokens, x, out);
}

std::vector<std::string> kernel_names() {
    return {
#define SPARSEFOLD_MATVEC(format, dtype, Packed) "matvec_" #format "_" #dtype, "matvec_events_" #format "_" #dtype,
#define SPARSEFOLD_MATVEC_X(format, dtype, Packed) "matvec_" #format "_" #dtype,
#define SPARSEFOLD_MATVEC_CODES(format, Packed) "matvec_" #format,
#define SPARSEFOLD_CELL(name, Args) "cell_" #name,
#include "kernels.def"
#undef SPARSEFOLD_MATVEC
#undef SPARSEFOLD_MATVEC_X
#undef SPARSEFOLD_MATVEC_CODES
#undef SPARSEFOLD_CELL
    };
}

void activations(Vector x, nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> sigmoid,
                 nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu> tanh, const std::string& isa) {
    if (x.shape(0) % kLanes || sigmoid.shape(0) != x.shape(0) || tanh.shape(0) != x.shape(0))
        throw std::invalid_argument("activations need three arrays of one length, a multiple of 16.");
    kernels(isa).activations(x.data(), sigmoid.data(), tanh.data(), size32(x.shape(0)));
}

}  // namespace

void bind_training(nb::module_& m);  // bind_train.cpp

NB_MODULE(_native, m) {
    m.def("available_isas", &available_isas);
    m.def("intel", &intel);
    m.def("kernels", &kernel_names);
    m.def("activations", &activations, "x"_a, "sigmoid"_a, "tanh"_a, "isa"_a = "");

    nb::class_<PyMatrix>(m, "Matrix")
        .def_static("dense", &PyMatrix::dense, "values"_a, "gates"_a = 1)
        .def_static("block", &PyMatrix::block, "rows"_a, "cols"_a, "gates"_a, "values"_a, "block_row"_a, "start"_a)
        .def("set_precision", &PyMatrix::set_precision, "precision"_a, "scale"_a)
        .def_static("complementary", &PyMatrix::complementary, "rows"_a, "gates"_a, "overlay"_a, "values"_a, "live"_a);

    nb::class_<PyPacked>(m, "Packed")
        .def(nb::init<const PyMatrix&, const std::string&>(), "matrix"_a, "isa"_a = "")
        .def_prop_ro("padded_rows", [](const PyPacked& p) { return p.matrix.padded_rows(); })
        .def_prop_ro("nbytes", [](const PyPacked& p) { return p.matrix.nbytes(); })
        .def("matvec", &PyPacked::matvec, "x"_a, "out"_a, "repeat"_a = 1)
        .def("matvec_events", &PyPacked::matvec_events, "index"_a, "value"_a, "out"_a)
        .def("matvec_lists", &PyPacked::matvec_lists, "index"_a, "value"_a, "start"_a, "out"_a);

    nb::class_<PyEngine>(m, "Engine")
        .def(nb::init<>())
        .def("add_embedding", &PyEngine::add_embedding, "weight"_a)
        .def("add_linear", &PyEngine::add_linear, "weight"_a, "bias"_a)
        .def("add_conv1d", &PyEngine::add_conv1d, "weight"_a, "bias"_a, "kernel"_a, "dilation"_a, "groups"_a)
        .def("add_gru", &PyEngine::add_gru, "weight_ih"_a, "weight_hh"_a, "bias_ih"_a, "bias_hh"_a, "reset_after"_a,
             "delta_input"_a = -1.0f, "delta_hidden"_a = -1.0f, "reverse"_a = false)
        .def("add_egru", &PyEngine::add_egru, "weight_ih"_a, "weight_hh"_a, "bias_ih"_a, "bias_hh"_a, "threshold"_a,
             "reset_after"_a, "reset"_a, "always"_a, "emits_events"_a, "zoneout"_a, "reverse"_a = false)
        .def("add_lstm", &PyEngine::add_lstm, "weight_ih"_a, "weight_hh"_a, "bias_ih"_a, "bias_hh"_a,
             "delta_input"_a = -1.0f, "delta_hidden"_a = -1.0f, "reverse"_a = false)
        .def("add_rnn", &PyEngine::add_rnn, "weight_ih"_a, "weight_hh"_a, "bias_ih"_a, "bias_hh"_a, "relu"_a,
             "delta_input"_a = -1.0f, "delta_hidden"_a = -1.0f, "reverse"_a = false)
        .def("add_relu", &PyEngine::add_relu)
        .def("add_events", &PyEngine::add_events, "units"_a)
        .def("add_kwta", &PyEngine::add_kwta, "units"_a, "k"_a, "groups"_a)
        .def("add_log_softmax", &PyEngine::add_log_softmax, "units"_a)
        .def("add_top_k", &PyEngine::add_top_k, "units"_a, "k"_a)
        .def("add_cluster", &PyEngine::add_cluster, "projection"_a, "weight"_a, "bias"_a, "units"_a, "at"_a)
        .def("add_layer_norm", &PyEngine::add_layer_norm, "weight"_a, "bias"_a, "epsilon"_a)
        .def("finish", &PyEngine::finish, "isa"_a, "fold_limit"_a, "threads"_a = 1)
        .def("step_batch_tokens", &PyEngine::step_batch_tokens, "streams"_a, "tokens"_a, "out"_a)
        .def("step_batch_values", &PyEngine::step_batch_values, "streams"_a, "x"_a, "out"_a)
        .def_prop_ro("isa", [](const PyEngine& e) { return e.get().isa; })
        .def_prop_ro("folded", [](const PyEngine& e) { return e.get().program.ops().front().folded; })
        .def_prop_ro("nbytes", [](const PyEngine& e) { return e.get().program.nbytes(); });

    nb::class_<PyStream>(m, "Stream")
        .def(nb::init<const PyEngine&>(), "engine"_a)
        .def("step", &PyStream::step, "x"_a.none(), "out"_a)
        .def("score", &PyStream::score, "x"_a.none(), "target"_a.none())
        .def("score_tokens", &PyStream::score_tokens, "tokens"_a, "targets"_a, "out"_a)
        .def("score_values", &PyStream::score_values, "x"_a, "targets"_a, "out"_a)
        .def("run_tokens", &PyStream::run_tokens, "tokens"_a, "out"_a, "trace"_a)
        .def("run_values", &PyStream::run_values, "x"_a, "out"_a, "trace"_a)
        .def("reset", &PyStream::reset)
        .def("reset_counters", &PyStream::reset_counters)
        .def("read", &PyStream::read, "op"_a, "name"_a, "out"_a)
        .def("write", &PyStream::write, "op"_a, "name"_a, "values"_a)
        .def_prop_ro("steps", &PyStream::steps)
        .def_prop_ro("trace_width", &PyStream::trace_width);

    bind_training(m);
}

}  // namespace sparsefold
