// Kernels and engine behind a pipe, so that a program for another processor can be asked from here what it computes.
// Built and asked by tests/native/test_arm64.py. A request is a letter and what it says below, in the processor's own
// byte order; the answer, if there is one, is an array of floats.
#include <cstdio>
#include <cstdlib>

#include "../../native/engine.hpp"
#include "../../native/load.hpp"

using namespace sparsefold;

namespace {

void read(void* to, size_t bytes) {
    if (std::fread(to, 1, bytes, stdin) != bytes) std::exit(3);  // the asker has gone away in the middle of a request
}

template <class T>
T read() {
    T value;
    read(&value, sizeof value);
    return value;
}

template <class T>
std::vector<T> read(size_t n) {
    std::vector<T> values(n);
    read(values.data(), n * sizeof(T));
    return values;
}

void answer(const float* values, size_t n) {
    std::fwrite(values, sizeof(float), n, stdout);
    std::fflush(stdout);
}

std::shared_ptr<const Engine> engine;
std::unique_ptr<Stream> stream;

/// isa size bytes: a program, and a stream of it.
void load() {
    const std::vector<char> isa = read<char>(read<uint32_t>()), bytes = read<char>(read<uint32_t>());
    engine = std::make_shared<const Engine>(load_program(bytes.data(), bytes.size()),
                                            std::string(isa.begin(), isa.end()), 8u << 20);
    stream = std::make_unique<Stream>(engine);
}

/// events x bias: the input matrix of the last op is multiplied, by dense x where `events` is -1, else by as many
/// columns, whose indices follow, and the bias is added -> y. The matrix is packed for one of the two.
void product() {
    const Matrix& w = engine->program.ops().back().input;
    const int32_t events = read<int32_t>();
    const auto index = read<uint32_t>(events < 0 ? 0 : events);
    const auto x = read<float>(events < 0 ? w.cols() : events);
    const auto bias = read<float>(w.padded_rows());
    std::vector<float> y(bias.size());
    std::vector<int8_t> codes(w.code_bytes());
    if (events < 0)
        w.matvec(*engine->kernels, x.data(), bias.data(), y.data(), codes.data());
    else
        w.matvec(*engine->kernels, Events{index.data(), x.data(), static_cast<uint32_t>(events)}, bias.data(),
                 y.data());
    answer(y.data(), y.size());
}

/// A state array of an op, its name's length and name, its values following -> none; or as it is -> its values.
void state(bool write) {
    const uint32_t op = read<uint32_t>();
    const std::vector<char> letters = read<char>(read<uint32_t>());
    const std::string name(letters.begin(), letters.end());
    if (name == "x") {
        if (write) return stream->set_history(op, read<float>(stream->history_size(op)).data());
        std::vector<float> found(stream->history_size(op));
        stream->history(op, found.data());
        return answer(found.data(), found.size());
    }
    CellArgs& cell = stream->state(op).cell;
    Carried found = stream->changes(op, name);
    if (!found.at) found = {name == "h" ? cell.h : name == "c" ? cell.c : cell.y, cell.units};
    std::vector<float> values(found.size());
    if (!write) {
        found.read(values.data());
        return answer(values.data(), values.size());
    }
    values = read<float>(values.size());
    if (name == "y")
        stream->set_emitted(op, values.data());
    else
        found.write(values.data());
}

/// A token, or x -> y.
void step() {
    const Program& program = engine->program;
    const int64_t token = program.takes_tokens() ? read<int64_t>() : 0;
    const auto x = read<float>(program.takes_tokens() ? 0 : program.inputs());
    std::vector<float> y(program.outputs());
    stream->step(token, x.data(), y.data());
    answer(y.data(), y.size());
}

/// n, x -> sigmoid(x), tanh(x) under the kernels of the engine.
void activations() {
    const auto x = read<float>(read<uint32_t>());
    std::vector<float> out(2 * x.size());
    engine->kernels->activations(x.data(), out.data(), out.data() + x.size(), static_cast<uint32_t>(x.size()));
    answer(out.data(), out.size());
}

}  // namespace

int main() {
    for (int letter; (letter = std::getchar()) != EOF;) switch (letter) {
            case 'L':
                load();
                break;
            case 'P':
                product();
                break;
            case 'W':
            case 'R':
                state(letter == 'W');
                break;
            case 'S':
                step();
                break;
            case 'A':
                activations();
                break;
            default:
                return 2;
        }
    return 0;
}
