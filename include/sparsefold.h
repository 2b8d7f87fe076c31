/* Playing a compiled program (.sfold) from C. See docs/c-api.md.
 *
 * Ownership: what a function named _load or _new gives is yours; give it back to the function named _free. A stream keeps
 * what it needs of its engine, so that either may be freed first. Nothing that you pass in is kept.
 *
 * Threads: an engine never changes; any number of threads and streams share it. A stream is used by one thread at a time; a
 * second thread gets SPARSEFOLD_ERROR_BUSY. There is no global state.
 *
 * Errors: a status other than SPARSEFOLD_OK means that nothing was done. No exception leaves the library.
 */
#ifndef SPARSEFOLD_H
#define SPARSEFOLD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(__GNUC__)
#define SPARSEFOLD_API __attribute__((visibility("default")))
#else
#define SPARSEFOLD_API
#endif

/* Changes when a program compiled against an older header would no longer work. */
#define SPARSEFOLD_ABI_VERSION 1u
SPARSEFOLD_API uint32_t sparsefold_abi_version(void);

typedef enum {
    SPARSEFOLD_OK = 0,
    SPARSEFOLD_ERROR_READ = 1,     /* the file cannot be read */
    SPARSEFOLD_ERROR_PROGRAM = 2,  /* it is not a program that this version plays */
    SPARSEFOLD_ERROR_ARGUMENT = 3, /* a null pointer, an unknown instruction set, op or counter, the other kind of step,
                                    * a stream of another engine, or twice, a score of a program that gives none */
    SPARSEFOLD_ERROR_TOKEN = 4,    /* the token is outside the vocabulary */
    SPARSEFOLD_ERROR_BUSY = 5,     /* another thread is using this stream */
    SPARSEFOLD_ERROR_MEMORY = 6,
    SPARSEFOLD_ERROR_SEQUENCE = 7, /* a step of a program that plays whole sequences */
    SPARSEFOLD_ERROR_TARGET = 8    /* the target is outside the outputs */
} sparsefold_status;

/* What a status means: one sentence, never null, never to be freed. */
SPARSEFOLD_API const char *sparsefold_status_text(sparsefold_status status);

/* Weights packed for this processor. */
typedef struct sparsefold_engine sparsefold_engine;

/* Reads a program from memory or from a file. The program is untrusted: whatever is wrong with it is an error.
 * isa: "avx512", "avx2", "neon" or "generic"; null: the environment's SPARSEFOLD_ISA if set, else the best of this processor.
 * message: receives at most message_size bytes of one sentence that says what was wrong, always terminated; may be null. */
SPARSEFOLD_API sparsefold_status sparsefold_load(const void *data, size_t size, const char *isa,
                                                 sparsefold_engine **engine, char *message, size_t message_size);
SPARSEFOLD_API sparsefold_status sparsefold_load_file(const char *path, const char *isa, sparsefold_engine **engine,
                                                      char *message, size_t message_size);
SPARSEFOLD_API void sparsefold_free(sparsefold_engine *engine); /* null is allowed */

typedef struct {
    size_t inputs;    /* tokens known, or values read per step */
    size_t outputs;   /* values given per step */
    size_t ops;       /* numbered from 0 in the order they are played */
    int takes_tokens; /* 1: sparsefold_step_token; 0: sparsefold_step_values */
    const char *isa;  /* the instruction set in use */
    int whole_sequences; /* 1: a layer reads backwards, so that only sparsefold_run_... plays it */
} sparsefold_info;

/* Lives as long as the engine. Later versions add fields at the end. */
SPARSEFOLD_API const sparsefold_info *sparsefold_describe(const sparsefold_engine *engine);

/* One sequence being played: its own state, all zero at first, and its own counters. */
typedef struct sparsefold_stream sparsefold_stream;

SPARSEFOLD_API sparsefold_stream *sparsefold_stream_new(const sparsefold_engine *engine); /* null: no memory left */
SPARSEFOLD_API void sparsefold_stream_free(sparsefold_stream *stream);                    /* null is allowed */
SPARSEFOLD_API sparsefold_status sparsefold_stream_reset(sparsefold_stream *stream);      /* state to zero; counters go on */

/* One step; y receives `outputs` values. Neither allocates. */
SPARSEFOLD_API sparsefold_status sparsefold_step_token(sparsefold_stream *stream, int64_t token, float *y);
SPARSEFOLD_API sparsefold_status sparsefold_step_values(sparsefold_stream *stream, const float *x, float *y);

/* `steps` steps: tokens (steps), or x (steps, inputs); y (steps, outputs). The same as a step after the other, without
 * allocation; but a program that plays whole sequences starts from zero at each call, keeps no state, and allocates room for the
 * outputs of two of its layers at all steps: SPARSEFOLD_ERROR_MEMORY where there is none. */
SPARSEFOLD_API sparsefold_status sparsefold_run_tokens(sparsefold_stream *stream, size_t steps, const int64_t *tokens,
                                                       float *y);
SPARSEFOLD_API sparsefold_status sparsefold_run_values(sparsefold_stream *stream, size_t steps, const float *x, float *y);

/* One step, of which only the natural logarithm of the probability of output `target` is wanted: the last op is a linear, whose
 * outputs are taken for logits, a log_softmax or a cluster; any other is SPARSEFOLD_ERROR_ARGUMENT. It reads no more of a decoder
 * in clusters than that takes: of all clusters the one that holds the target, or none. State and counters go on as in a step.
 * Then the same of `steps` steps: tokens (steps), or x (steps, inputs); targets and scores (steps). None allocates. */
SPARSEFOLD_API sparsefold_status sparsefold_score_token(sparsefold_stream *stream, int64_t token, int64_t target,
                                                        float *score);
SPARSEFOLD_API sparsefold_status sparsefold_score_values(sparsefold_stream *stream, const float *x, int64_t target,
                                                         float *score);
SPARSEFOLD_API sparsefold_status sparsefold_score_tokens(sparsefold_stream *stream, size_t steps, const int64_t *tokens,
                                                         const int64_t *targets, float *scores);
SPARSEFOLD_API sparsefold_status sparsefold_score_rows(sparsefold_stream *stream, size_t steps, const float *x,
                                                       const int64_t *targets, float *scores);

/* One step of each of `count` different streams of this engine, bit for bit what a step of each alone gives: tokens (count), or
 * x (count, inputs); y (count, outputs). They share what is read of the weights, and the engine's threads. Neither allocates.
 * A stream of another engine, or named twice, is SPARSEFOLD_ERROR_ARGUMENT. */
SPARSEFOLD_API sparsefold_status sparsefold_step_batch_tokens(const sparsefold_engine *engine,
                                                              sparsefold_stream *const *streams, size_t count,
                                                              const int64_t *tokens, float *y);
SPARSEFOLD_API sparsefold_status sparsefold_step_batch_values(const sparsefold_engine *engine,
                                                              sparsefold_stream *const *streams, size_t count,
                                                              const float *x, float *y);

/* Between how many threads a batch is divided, the caller's among them: 1 at first, at most 256. Not while one is played. They
 * spin for 0.3 ms after a batch and sleep then. With two or more, steps of a single stream that follow one another closely share
 * a second thread where recurrent products are large. No bit depends on any of them; a child of fork plays in one thread. */
SPARSEFOLD_API sparsefold_status sparsefold_set_threads(sparsefold_engine *engine, size_t threads);

typedef enum {
    SPARSEFOLD_STEPS = 0,       /* one value: steps played; op is not read */
    SPARSEFOLD_EVENTS = 1,      /* one value per unit of an egru or relu: events it emitted */
    SPARSEFOLD_INPUT_READS = 2, /* one per input column of an op that reads their events, or changes: how often it read one */
    SPARSEFOLD_HIDDEN_READS = 3, /* one per unit of an egru, or of an op that sends the changes of its units: how often its own
                                  * recurrent matrix read one */
    SPARSEFOLD_ASKED = 4        /* one value of a cluster: steps that computed it */
} sparsefold_counter;

/* Copies a counter of one op. *count: in, the room in values; out, how many values there are (0 where the op does not count
 * this). Less room than that is SPARSEFOLD_ERROR_ARGUMENT with *count set; null values and no room ask for the count. */
SPARSEFOLD_API sparsefold_status sparsefold_counters(sparsefold_stream *stream, size_t op, sparsefold_counter counter,
                                                     uint64_t *values, size_t *count);

#ifdef __cplusplus
}
#endif
#endif
