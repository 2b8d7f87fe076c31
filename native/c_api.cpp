// The C interface: handles around Engine and Stream. No exception passes it.
#include "../include/sparsefold.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <new>

#include "engine.hpp"
#include "load.hpp"

using namespace sparsefold;

struct sparsefold_engine {
    std::shared_ptr<const Engine> engine;
    Crew::Pointer crew;
    sparsefold_info info;
};

struct sparsefold_stream {
    explicit sparsefold_stream(std::shared_ptr<const Engine> engine) : stream(std::move(engine)) {}
    Stream stream;
};

namespace {

constexpr uint64_t kFoldLimit = 8u << 20;  // as Engine's fold="auto" in Python; it changes no output

void say(char* message, size_t size, const std::string& text) {
    if (message && size) std::snprintf(message, size, "%s", text.c_str());
}

/// Runs `body`, turning what it throws into a status and a sentence.
template <class Body>
sparsefold_status guarded(char* message, size_t size, Body body) noexcept {
    try {
        body();
        return SPARSEFOLD_OK;
    } catch (const LoadError& error) {
        say(message, size, std::string(error.what()) + ".");
        return SPARSEFOLD_ERROR_PROGRAM;
    } catch (const std::invalid_argument& error) {
        say(message, size, error.what());
        return SPARSEFOLD_ERROR_ARGUMENT;
    } catch (...) {  // bad_alloc and length_error; std::string may not fit any more
        if (message && size) std::snprintf(message, size, "%s", sparsefold_status_text(SPARSEFOLD_ERROR_MEMORY));
        return SPARSEFOLD_ERROR_MEMORY;
    }
}

sparsefold_status step(sparsefold_stream* handle, bool takes_tokens, int64_t token, const float* x, float* y) {
    if (!handle || !y || (!takes_tokens && !x)) return SPARSEFOLD_ERROR_ARGUMENT;
    Stream& stream = handle->stream;
    const Program& program = stream.engine().program;
    if (program.takes_tokens() != takes_tokens) return SPARSEFOLD_ERROR_ARGUMENT;
    if (program.whole_sequences()) return SPARSEFOLD_ERROR_SEQUENCE;
    if (takes_tokens && (token < 0 || token >= static_cast<int64_t>(program.inputs()))) return SPARSEFOLD_ERROR_TOKEN;
    const Claim claim(stream);
    if (!claim) return SPARSEFOLD_ERROR_BUSY;
    stream.step(token, x, y);
    return SPARSEFOLD_OK;
}

sparsefold_status run(sparsefold_stream* handle, bool takes_tokens, size_t steps, const int64_t* tokens, const float* x,
                      float* y) {
    if (!handle || (steps && (!y || !(takes_tokens ? static_cast<const void*>(tokens) : x))))
        return SPARSEFOLD_ERROR_ARGUMENT;
    Stream& stream = handle->stream;
    const Program& program = stream.engine().program;
    if (program.takes_tokens() != takes_tokens) return SPARSEFOLD_ERROR_ARGUMENT;
    for (size_t t = 0; takes_tokens && t < steps; ++t)
        if (tokens[t] < 0 || tokens[t] >= static_cast<int64_t>(program.inputs())) return SPARSEFOLD_ERROR_TOKEN;
    const Claim claim(stream);
    if (!claim) return SPARSEFOLD_ERROR_BUSY;
    return guarded(nullptr, 0, [&] { stream.run(steps, tokens, x, y); });
}

sparsefold_status score(sparsefold_stream* handle, bool takes_tokens, size_t steps, const int64_t* tokens,
                        const float* x, const int64_t* targets, float* scores) {
    if (!handle || (steps && (!targets || !scores || !(takes_tokens ? static_cast<const void*>(tokens) : x))))
        return SPARSEFOLD_ERROR_ARGUMENT;
    Stream& stream = handle->stream;
    const Program& program = stream.engine().program;
    if (program.takes_tokens() != takes_tokens) return SPARSEFOLD_ERROR_ARGUMENT;
    if (program.whole_sequences()) return SPARSEFOLD_ERROR_SEQUENCE;
    if (!program.scores()) return SPARSEFOLD_ERROR_ARGUMENT;
    for (size_t t = 0; t < steps; ++t) {
        if (takes_tokens && (tokens[t] < 0 || tokens[t] >= static_cast<int64_t>(program.inputs())))
            return SPARSEFOLD_ERROR_TOKEN;
        if (targets[t] < 0 || targets[t] >= static_cast<int64_t>(program.outputs())) return SPARSEFOLD_ERROR_TARGET;
    }
    const Claim claim(stream);
    if (!claim) return SPARSEFOLD_ERROR_BUSY;
    stream.score(steps, tokens, x, targets, scores);
    return SPARSEFOLD_OK;
}

sparsefold_status step_batch(const sparsefold_engine* handle, sparsefold_stream* const* handles, size_t n,
                             bool takes_tokens, const int64_t* tokens, const float* x, float* y) {
    if (!handle || (n && (!handles || !y || !(takes_tokens ? static_cast<const void*>(tokens) : x))))
        return SPARSEFOLD_ERROR_ARGUMENT;
    const Program& program = handle->engine->program;
    if (program.takes_tokens() != takes_tokens) return SPARSEFOLD_ERROR_ARGUMENT;
    if (program.whole_sequences()) return SPARSEFOLD_ERROR_SEQUENCE;
    for (size_t s = 0; s < n; ++s) {
        if (!handles[s] || &handles[s]->stream.engine() != handle->engine.get()) return SPARSEFOLD_ERROR_ARGUMENT;
        if (takes_tokens && (tokens[s] < 0 || tokens[s] >= static_cast<int64_t>(program.inputs())))
            return SPARSEFOLD_ERROR_TOKEN;
    }
    const auto stream = [&](size_t s) -> Stream& { return handles[s]->stream; };
    const Claims claims(stream, n);
    if (!claims) {
        const auto* const end = handles + claims.refused();
        return std::find(handles, end, *end) == end ? SPARSEFOLD_ERROR_BUSY : SPARSEFOLD_ERROR_ARGUMENT;
    }
    handle->crew->step_batch(stream, n, tokens, x, y);
    return SPARSEFOLD_OK;
}

}  // namespace

uint32_t sparsefold_abi_version(void) { return SPARSEFOLD_ABI_VERSION; }

const char* sparsefold_status_text(sparsefold_status status) {
    switch (status) {
        case SPARSEFOLD_OK:
            return "All is well.";
        case SPARSEFOLD_ERROR_READ:
            return "The file cannot be read.";
        case SPARSEFOLD_ERROR_PROGRAM:
            return "This is not a program that this version plays.";
        case SPARSEFOLD_ERROR_ARGUMENT:
            return "An argument is null or does not fit this program.";
        case SPARSEFOLD_ERROR_TOKEN:
            return "The token is outside the vocabulary: it must be at least 0 and less than the engine's inputs.";
        case SPARSEFOLD_ERROR_BUSY:
            return "Another thread is using this stream. Give each thread its own.";
        case SPARSEFOLD_ERROR_MEMORY:
            return "There is not enough memory.";
        case SPARSEFOLD_ERROR_SEQUENCE:
            return "This program plays whole sequences, not one step: a layer reads backwards. Call "
                   "sparsefold_run_....";
        case SPARSEFOLD_ERROR_TARGET:
            return "The target is outside the outputs: it must be at least 0 and less than the engine's outputs.";
    }
    return "This status is unknown.";
}

sparsefold_status sparsefold_load(const void* data, size_t size, const char* isa, sparsefold_engine** engine,
                                  char* message, size_t message_size) {
    say(message, message_size, "");
    if (!engine || (!data && size)) {
        say(message, message_size, sparsefold_status_text(SPARSEFOLD_ERROR_ARGUMENT));
        return SPARSEFOLD_ERROR_ARGUMENT;
    }
    *engine = nullptr;
    return guarded(message, message_size, [&] {
        auto made = std::make_unique<sparsefold_engine>();
        made->engine = std::make_shared<const Engine>(load_program(data, size), isa ? isa : "", kFoldLimit);
        made->crew.reset(new Crew(1));
        const Program& program = made->engine->program;
        made->info = {program.inputs(),       program.outputs(),         program.ops().size(),
                      program.takes_tokens(), made->engine->isa.c_str(), program.whole_sequences()};
        *engine = made.release();
    });
}

sparsefold_status sparsefold_load_file(const char* path, const char* isa, sparsefold_engine** engine, char* message,
                                       size_t message_size) {
    if (!path) return sparsefold_load(nullptr, 1, isa, engine, message, message_size);
    if (engine) *engine = nullptr;
    std::vector<unsigned char> bytes;
    bool whole = false;
    const sparsefold_status read = guarded(message, message_size, [&] {
        struct Close {
            void operator()(std::FILE* f) const { std::fclose(f); }
        };
        errno = 0;
        const std::unique_ptr<std::FILE, Close> file(std::fopen(path, "rb"));
        for (size_t had = 0; file;) {  // without asking for the size: a pipe has none
            bytes.resize(had + (had < (1u << 20) ? 1u << 16 : had));
            const size_t got = std::fread(bytes.data() + had, 1, bytes.size() - had, file.get());
            had += got;
            if (had == bytes.size()) continue;
            bytes.resize(had);
            whole = !std::ferror(file.get());
            break;
        }
        if (!whole) say(message, message_size, std::string("cannot read ") + path + ": " + std::strerror(errno) + ".");
    });
    if (read != SPARSEFOLD_OK) return read;
    if (!whole) return SPARSEFOLD_ERROR_READ;
    return sparsefold_load(bytes.data(), bytes.size(), isa, engine, message, message_size);
}

void sparsefold_free(sparsefold_engine* engine) { delete engine; }

const sparsefold_info* sparsefold_describe(const sparsefold_engine* engine) { return engine ? &engine->info : nullptr; }

sparsefold_stream* sparsefold_stream_new(const sparsefold_engine* engine) {
    if (!engine) return nullptr;
    sparsefold_stream* made = nullptr;
    guarded(nullptr, 0, [&] { made = new sparsefold_stream(engine->engine); });
    return made;
}

void sparsefold_stream_free(sparsefold_stream* stream) { delete stream; }

sparsefold_status sparsefold_stream_reset(sparsefold_stream* stream) {
    if (!stream) return SPARSEFOLD_ERROR_ARGUMENT;
    const Claim claim(stream->stream);
    if (!claim) return SPARSEFOLD_ERROR_BUSY;
    stream->stream.reset();
    return SPARSEFOLD_OK;
}

sparsefold_status sparsefold_step_token(sparsefold_stream* stream, int64_t token, float* y) {
    return step(stream, true, token, nullptr, y);
}

sparsefold_status sparsefold_step_values(sparsefold_stream* stream, const float* x, float* y) {
    return step(stream, false, 0, x, y);
}

sparsefold_status sparsefold_run_tokens(sparsefold_stream* stream, size_t steps, const int64_t* tokens, float* y) {
    return run(stream, true, steps, tokens, nullptr, y);
}

sparsefold_status sparsefold_run_values(sparsefold_stream* stream, size_t steps, const float* x, float* y) {
    return run(stream, false, steps, nullptr, x, y);
}

sparsefold_status sparsefold_score_token(sparsefold_stream* stream, int64_t token, int64_t target, float* score_of) {
    return score(stream, true, 1, &token, nullptr, &target, score_of);
}

sparsefold_status sparsefold_score_values(sparsefold_stream* stream, const float* x, int64_t target, float* score_of) {
    return score(stream, false, 1, nullptr, x, &target, score_of);
}

sparsefold_status sparsefold_score_tokens(sparsefold_stream* stream, size_t steps, const int64_t* tokens,
                                          const int64_t* targets, float* scores) {
    return score(stream, true, steps, tokens, nullptr, targets, scores);
}

sparsefold_status sparsefold_score_rows(sparsefold_stream* stream, size_t steps, const float* x, const int64_t* targets,
                                        float* scores) {
    return score(stream, false, steps, nullptr, x, targets, scores);
}

sparsefold_status sparsefold_step_batch_tokens(const sparsefold_engine* engine, sparsefold_stream* const* streams,
                                               size_t count, const int64_t* tokens, float* y) {
    return step_batch(engine, streams, count, true, tokens, nullptr, y);
}

sparsefold_status sparsefold_step_batch_values(const sparsefold_engine* engine, sparsefold_stream* const* streams,
                                               size_t count, const float* x, float* y) {
    return step_batch(engine, streams, count, false, nullptr, x, y);
}

sparsefold_status sparsefold_set_threads(sparsefold_engine* engine, size_t threads) {
    if (!engine || threads < 1 || threads > Crew::kMost) return SPARSEFOLD_ERROR_ARGUMENT;
    return guarded(nullptr, 0, [&] {
        engine->crew.reset(new Crew(threads));
        engine->engine->set_threads(threads);
    });
}

sparsefold_status sparsefold_counters(sparsefold_stream* handle, size_t op, sparsefold_counter counter,
                                      uint64_t* values, size_t* count) {
    if (!handle || !count) return SPARSEFOLD_ERROR_ARGUMENT;
    const Stream& stream = handle->stream;
    const Claim claim(handle->stream);
    if (!claim) return SPARSEFOLD_ERROR_BUSY;
    const uint64_t steps = stream.steps();
    const uint64_t* from = &steps;
    size_t size = 1;
    if (counter != SPARSEFOLD_STEPS) {
        if (op >= stream.engine().program.ops().size()) return SPARSEFOLD_ERROR_ARGUMENT;
        const OpState& state = stream.state(op);
        const std::vector<uint64_t>* of = counter == SPARSEFOLD_EVENTS         ? &state.events
                                          : counter == SPARSEFOLD_INPUT_READS  ? &state.input_reads
                                          : counter == SPARSEFOLD_HIDDEN_READS ? &state.hidden_reads
                                                                               : nullptr;
        if (!of && counter != SPARSEFOLD_ASKED) return SPARSEFOLD_ERROR_ARGUMENT;
        from = of ? of->data() : &state.asked;
        size = of ? of->size() : stream.engine().program.ops()[op].kind == Op::Kind::cluster;
    }
    const size_t room = *count;
    *count = size;
    if (!values && room == 0) return SPARSEFOLD_OK;
    if (!values || room < size) return SPARSEFOLD_ERROR_ARGUMENT;
    if (size) std::memcpy(values, from, size * sizeof(uint64_t));
    return SPARSEFOLD_OK;
}
