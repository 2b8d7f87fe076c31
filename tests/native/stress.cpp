// The native core without Python, for sanitizers: odd sizes, all formats and forms, hostile indices, streams in two
// threads. Built and run by tests/native/test_sanitizers.py.
#include <cmath>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>

#include "../../native/engine.hpp"

using namespace sparsefold;

namespace {

std::mt19937 random_engine(0);

std::vector<float> floats(size_t n) {
    std::normal_distribution<float> normal(0.0f, 0.3f);
    std::vector<float> out(n);
    for (float& v : out) v = normal(random_engine);
    return out;
}

/// Owns what a MatrixView borrows.
struct Stored {
    std::vector<float> values;
    std::vector<uint32_t> block_row, start;
    std::vector<uint8_t> live;
    MatrixView view;
};

/// br rows by bc columns; br = 0: dense, or complementary with an overlay of bc where that is not 0.
Stored stored(uint32_t units, uint32_t cols, uint32_t gates, uint32_t br, uint32_t bc, double density) {
    Stored s;
    s.view.rows = units * gates;
    s.view.cols = cols;
    s.view.gates = gates;
    if (br == 0 && bc == 0) {
        s.values = floats(size_t{units} * gates * cols);
    } else if (br == 0) {
        s.view.format = MatrixView::Format::complementary;
        s.view.overlay = bc;
        s.values = floats(size_t{cols} * gates * ((units + bc - 1) / bc));
        for (size_t i = 0; i < s.values.size(); ++i)
            s.live.push_back(static_cast<uint8_t>(std::uniform_int_distribution<uint32_t>(0, bc - 1)(random_engine)));
    } else {
        s.view.format = MatrixView::Format::block;
        s.view.block_rows = br;
        s.view.block_cols = bc;
        const uint32_t rows = gates * ((units + br - 1) / br);
        s.start.push_back(0);
        for (uint32_t c = 0; c < (cols + bc - 1) / bc; ++c) {
            for (uint32_t r = 0; r < rows; ++r)
                if (std::uniform_real_distribution<>(0, 1)(random_engine) < density) s.block_row.push_back(r);
            s.start.push_back(static_cast<uint32_t>(s.block_row.size()));
        }
        s.values = floats(s.block_row.size() * br * bc);
    }
    s.view.values = s.values.data();
    s.view.block_row = s.block_row.data();
    s.view.start = s.start.data();
    s.view.blocks = s.block_row.size();
    s.view.live = s.live.data();
    return s;
}

std::shared_ptr<const Engine> network(const std::string& isa, uint32_t units, uint32_t br, uint32_t bc, int form,
                                      uint64_t fold) {
    const uint32_t tokens = 7, width = 5;
    Program p;
    const auto table = floats(size_t{tokens} * width);
    p.add_embedding(table.data(), tokens, width);
    const auto bias = floats(size_t{3} * units), threshold = std::vector<float>(units, 0.05f);
    const Reset reset = form % 3 == 0 ? Reset::threshold : form % 3 == 1 ? Reset::output : Reset::none;
    const Stored first = stored(units, width, 3, br, bc, 0.5), hidden = stored(units, units, 3, br, bc, 0.3);
    p.add_egru(first.view, hidden.view, bias.data(), bias.data(), threshold.data(), form % 2 == 0, reset, form == 5,
               true, 0.1f);
    const Stored second = stored(units, units, 3, br, bc, 0.2);
    const Deltas none, both{0.1f, form % 3 ? 0.05f : 0.0f}, inputs{0.0f, -1};
    p.add_gru(second.view, hidden.view, bias.data(), bias.data(), form % 2 == 0,
              form < 2   ? none
              : form % 2 ? inputs
                         : both);
    p.add_egru(second.view, hidden.view, bias.data(), bias.data(), threshold.data(), form % 2 == 1, reset, false,
               form < 3, 0.0f);
    const Stored four = stored(units, units, 4, br, bc, 0.2), one = stored(units, units, 1, br, bc, 0.2);
    const auto long_bias = floats(size_t{4} * units);
    p.add_lstm(four.view, four.view, long_bias.data(), long_bias.data(), form < 3 ? none : both);
    p.add_rnn(one.view, one.view, bias.data(), bias.data(), form % 2 == 0);
    p.add_layer_norm(bias.data(), bias.data(), units, 1e-5f);
    p.add_relu();
    const Stored last = stored(tokens, units, 1, br, bc, 0.5);
    p.add_linear(last.view, floats(tokens).data());
    return std::make_shared<const Engine>(std::move(p), isa, fold);
}

void play(const std::shared_ptr<const Engine>& engine, int steps) {
    Stream stream(engine);
    std::vector<float> out(engine->program.outputs());
    std::vector<uint8_t> trace(stream.trace_width());
    for (int t = 0; t < steps; ++t) stream.step(t % engine->program.inputs(), nullptr, out.data(), trace.data());
    for (float v : out)
        if (!std::isfinite(v)) throw std::runtime_error("a sound network gave a value that is not finite");
    // NaN is an event and spreads to every unit and to the padding behind them, which must not speak.
    const std::vector<float> all(engine->program.ops()[1].outputs, NAN);
    stream.set_emitted(1, all.data());
    stream.step(0, nullptr, out.data());
    stream.reset();
    stream.reset_counters();
}

/// True when packing throws std::invalid_argument.
bool refused(const MatrixView& view) {
    try {
        Matrix matrix(view, Matrix::Reads::events);
    } catch (const std::invalid_argument&) {
        return true;
    }
    return false;
}

void hostile() {
    Stored s = stored(40, 10, 3, 16, 1, 0.5);
    const auto expect = [&](const char* what) {
        if (!refused(s.view)) throw std::runtime_error(std::string("not refused: ") + what);
    };
    const uint32_t keep = s.block_row[0];
    s.block_row[0] = 9;
    expect("a block row out of range");
    s.block_row[0] = 0xffffffffu;
    expect("a huge block row");
    s.block_row[0] = keep;
    const uint32_t start = s.start[3];
    s.start[3] = 0xfffffff0u;
    expect("a start beyond the blocks");
    s.start[3] = start;
    s.view.blocks += 1;
    expect("blocks that no column owns");
    s.view.blocks -= 1;
    s.view.gates = 7;
    expect("gates that do not divide the rows");
    s.view.gates = 0;
    expect("no gates");
    s.view.gates = 3;
    s.view.block_rows = 0;
    expect("a block without rows");

    s = stored(40, 10, 3, 0, 4, 1.0);
    for (const uint32_t live : {4u, 64u, 254u, 255u})
        for (const size_t at : {size_t{0}, s.live.size() / 2, s.live.size() - 1}) {
            const uint8_t sound = s.live[at];
            s.live[at] = static_cast<uint8_t>(live);
            expect("a live row that its set does not have");
            s.live[at] = sound;
        }
    for (const uint32_t overlay : {0u, 65u, 0xffffffffu}) {
        s.view.overlay = overlay;
        expect("an overlay out of bounds");
    }
    s.view.overlay = 4;
    s.view.gates = 7;
    expect("gates that do not divide the rows of a complementary matrix");
    s.view.gates = 0;
    expect("a complementary matrix without gates");
    s.view.gates = 3;
    s.view.rows = 1u << 29;
    expect("a complementary matrix of too many rows");
    s.view.rows = 120;
    if (refused(s.view)) throw std::runtime_error("refused: a sound complementary matrix");
}

/// A product of `matrix` into a y of exactly its padded rows, dense and by events: under the sanitizers, nothing else
/// is read.
void product(const Stored& s, const std::string& isa) {
    const Matrix matrix(s.view, Matrix::Reads::events), by_rows(s.view, Matrix::Reads::dense);
    const std::vector<float> x = floats(matrix.cols());
    std::vector<float> y(matrix.padded_rows(), 1.0f), z = y;  // which are overwritten
    std::vector<uint32_t> index(matrix.cols());
    for (uint32_t c = 0; c < matrix.cols(); ++c) index[c] = c;
    by_rows.matvec(kernels(isa), x.data(), nullptr, y.data(), nullptr);
    matrix.matvec(kernels(isa), Events{index.data(), x.data(), matrix.cols()}, nullptr, z.data());
    for (size_t i = 0; i < y.size(); ++i)  // packed by rows, the terms of a sum come in another order
        if (!(std::abs(y[i] - z[i]) <= 1e-4f)) throw std::runtime_error("all columns as events give another product");
}

/// More rows than 16 bits count, in every height that is written by hand and in another.
void tall(const std::string& isa) {
    for (auto [br, bc] : {std::pair{1u, 1u}, {4u, 1u}, {8u, 1u}, {16u, 1u}, {5u, 3u}, {0u, 4u}})
        for (uint32_t units : {65536u, 65537u}) product(stored(units, 2, 1, br, bc, 0.1), isa);
}

}  // namespace

int main() {
    hostile();
    for (const std::string& isa : available_isas()) {
        tall(isa);
        for (uint32_t units : {1u, 3u, 16u, 17u, 50u, 130u})
            for (auto [br, bc] : {std::pair{0u, 0u},
                                  {0u, 1u},
                                  {0u, 4u},
                                  {0u, 17u},
                                  {0u, 64u},
                                  {1u, 1u},
                                  {2u, 1u},
                                  {4u, 1u},
                                  {16u, 1u},
                                  {32u, 1u},
                                  {8u, 4u},
                                  {5u, 3u},
                                  {20u, 2u}}) {
                product(stored(units, 7, 3, br, bc, 0.5), isa);
                for (int form = 0; form < 6; ++form) play(network(isa, units, br, bc, form, form % 2 ? ~0ull : 0), 12);
            }
    }
    const auto shared = network("", 130, 16, 1, 3, ~0ull);  // whose memories of changes are summed anew once
    std::thread other([&] { play(shared, 1100); });
    play(shared, 1100);
    other.join();
    std::puts("ok");
    return 0;
}
