// Reading a file that nobody meant well: whatever the bytes, load_program gives a program that plays, or throws
// LoadError.
//
// With libFuzzer:   clang++ -std=c++17 -DSPARSEFOLD_LIBFUZZER -DSPARSEFOLD_X86=1 -fsanitize=fuzzer,address,undefined
// ... With any compiler (tests/native/test_fuzz.py):   fuzz_load SECONDS SEED KEEP FILES...   changes the files for so
// long, the same changes for one seed, and leaves in the folder KEEP some of what it made, named .sound or .broken by
// its verdict, and what it was reading when a sanitizer stopped it as `crash`.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <random>

#include "../../native/engine.hpp"
#include "../../native/load.hpp"

using namespace sparsefold;

namespace {

bool play(const uint8_t* data, size_t size) {
    Program program;
    try {
        program = load_program(data, size);
    } catch (const LoadError& error) {
        if (error.offset > size) std::abort();
        return false;
    }
    Stream stream(std::make_shared<const Engine>(std::move(program), "", 1u << 20));
    const Program& played = stream.engine().program;
    const bool tokens = played.takes_tokens();
    const std::vector<float> x(tokens ? 0 : 3 * size_t{played.inputs()}, 0.5f);
    const int64_t token[3] = {0, 1 % played.inputs(), 2 % played.inputs()};
    std::vector<float> out(3 * size_t{played.outputs()});
    stream.run(3, tokens ? token : nullptr, tokens ? nullptr : x.data(), out.data());
    if (played.whole_sequences() || !played.scores()) return true;
    const int64_t target[3] = {0, played.outputs() / 2, int64_t{played.outputs()} - 1};
    stream.score(3, tokens ? token : nullptr, tokens ? nullptr : x.data(), target, out.data());
    return true;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
    play(data, size);
    return 0;
}

#ifndef SPARSEFOLD_LIBFUZZER

extern "C" void __sanitizer_set_death_callback(void (*)());

namespace {

using Bytes = std::vector<uint8_t>;

Bytes reading;
std::string keep;

void write(const std::string& path, const Bytes& bytes) {
    std::ofstream(path, std::ios::binary)
        .write(reinterpret_cast<const char*>(bytes.data()), static_cast<long>(bytes.size()));
}

class Mutator {
  public:
    Mutator(std::vector<Bytes> corpus, unsigned seed) : corpus_(std::move(corpus)), random_(seed) {}

    Bytes next() {
        Bytes file = corpus_[below(corpus_.size())];
        for (size_t n = 1 + below(3); n; --n) change(file);
        if (below(8)) mend(file);
        return file;
    }

  private:
    size_t below(size_t n) { return n ? random_() % n : 0; }

    void change(Bytes& file) {
        static const std::vector<std::string> words = {"0",
                                                       "-1",
                                                       "1e9",
                                                       "4294967295",
                                                       "4294967296",
                                                       "268435455",
                                                       "268435456",
                                                       "281474976710655",
                                                       "18446744073709551615",
                                                       "null",
                                                       "true",
                                                       "NaN",
                                                       "[]",
                                                       "{}",
                                                       "\"\"",
                                                       ",",
                                                       ":",
                                                       "\"",
                                                       "[",
                                                       "]",
                                                       "{",
                                                       "}",
                                                       "\\ud83d",
                                                       "\\u0000",
                                                       "\xff",
                                                       "dense",
                                                       "block",
                                                       "gru",
                                                       "egru",
                                                       "linear",
                                                       "lstm",
                                                       "rnn",
                                                       "relu",
                                                       "layer_norm",
                                                       "log_softmax",
                                                       "cluster",
                                                       "tanh",
                                                       "delta_input",
                                                       "delta_hidden",
                                                       "csc",
                                                       "complementary",
                                                       "embedding",
                                                       "F32",
                                                       "U32",
                                                       "U16",
                                                       "U8",
                                                       "state",
                                                       "always",
                                                       "output",
                                                       "none"};
        static const uint32_t numbers[] = {0,          1,          0x7fffffff, 0x80000000, 0xffffffff,
                                           0x7f800000, 0x7fc00000, 0x00000001, 0x7f7fffff};
        const size_t at = below(file.size() + 1), left = file.size() - at;
        const auto place = file.begin() + static_cast<long>(at);
        switch (below(8)) {
            case 0:  // a bit
                if (left) file[at] ^= static_cast<uint8_t>(1u << below(8));
                break;
            case 1:  // a digit for a digit: the structure stays
                for (size_t i = at; i < file.size(); ++i)
                    if (file[i] >= '0' && file[i] <= '9') {
                        file[i] = static_cast<uint8_t>('0' + below(10));
                        break;
                    }
                break;
            case 2: {  // a word for a number or a name
                const std::string& word = words[below(words.size())];
                const auto end = std::find_if_not(place, file.end(), [](uint8_t c) { return std::isalnum(c); });
                const auto rest = file.erase(place, end);
                file.insert(rest, word.begin(), word.end());
                break;
            }
            case 3:  // something is missing
                file.erase(place, place + static_cast<long>(below(std::min<size_t>(left, 64) + 1)));
                break;
            case 4: {  // something is there twice
                const Bytes piece(place, place + static_cast<long>(below(std::min<size_t>(left, 200) + 1)));
                file.insert(file.begin() + static_cast<long>(below(file.size() + 1)), piece.begin(), piece.end());
                break;
            }
            case 5: {  // the rest of another file
                const Bytes& other = corpus_[below(corpus_.size())];
                file.resize(at);
                file.insert(file.end(), other.begin() + static_cast<long>(std::min(at, other.size())), other.end());
                break;
            }
            case 6:  // a number of the data
                if (left >= 4) {
                    const uint32_t n =
                        below(2) ? numbers[below(std::size(numbers))] : static_cast<uint32_t>(below(300));
                    std::memcpy(&file[file.size() - left / 4 * 4], &n, 4);
                }
                break;
            default:
                if (left) file[at] = static_cast<uint8_t>(below(256));
        }
    }

    /// Makes the header's length and the checksum right again, so that most files get past both.
    static void mend(Bytes& file) {
        static const std::string end = "]}}", sum = "\"crc32\": \"";
        if (file.size() < 8) return;
        uint64_t length;
        std::memcpy(&length, file.data(), 8);
        auto header = std::find_end(file.begin() + 8, file.end(), end.begin() + 1, end.end());
        if (header != file.end()) {
            length = static_cast<uint64_t>(header - file.begin()) - 6;
            std::memcpy(file.data(), &length, 8);
        }
        const auto at = std::search(file.begin(), file.end(), sum.begin(), sum.end());
        if (length > file.size() - 8 || file.end() - at < static_cast<long>(sum.size() + 8)) return;
        char digits[9];
        std::snprintf(digits, sizeof digits, "%08x", crc32(file.data() + 8 + length, file.size() - 8 - length));
        std::copy(digits, digits + 8, at + static_cast<long>(sum.size()));
    }

    std::vector<Bytes> corpus_;
    std::mt19937 random_;
};

}  // namespace

int main(int count, char** words) {
    if (count < 5) {
        std::fputs("usage: fuzz_load SECONDS SEED KEEP FILES...\n", stderr);
        return 2;
    }
    keep = words[3];
    __sanitizer_set_death_callback([] { write(keep + "/crash", reading); });
    std::vector<Bytes> corpus;
    for (int i = 4; i < count; ++i) {
        std::ifstream file(words[i], std::ios::binary);
        corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
        reading = corpus.back();
        play(reading.data(), reading.size());
    }
    Mutator mutator(corpus, static_cast<unsigned>(std::atoi(words[2])));
    const auto until = std::chrono::steady_clock::now() + std::chrono::seconds(std::atoi(words[1]));
    size_t kept[2] = {0, 0}, seen[2] = {0, 0};
    while (std::chrono::steady_clock::now() < until) {
        reading = mutator.next();
        const Bytes file(reading);  // exactly as large as it is: a read past its end is seen
        const bool sound = play(file.data(), file.size());
        ++seen[sound];
        if (kept[sound] < 500) write(keep + "/" + std::to_string(kept[sound]++) + (sound ? ".sound" : ".broken"), file);
    }
    std::printf("%zu sound, %zu broken\n", seen[1], seen[0]);
    return 0;
}

#endif
