/* Counts every allocation of a process: as a library loaded before all others, and, with PLAY, as a program that plays each
 * .sfold named on its command line in every way the C interface has, and prints what it counted after the streams were made.
 * Built and run by tests/native/test_allocations.py. */
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>

extern void *__libc_malloc(size_t size);
extern void *__libc_calloc(size_t count, size_t size);
extern void *__libc_realloc(void *old, size_t size);
extern void *__libc_memalign(size_t line, size_t size);

static uint64_t counted;

uint64_t allocations(void) { return __atomic_load_n(&counted, __ATOMIC_RELAXED); }

static void one_more(void) { __atomic_fetch_add(&counted, 1, __ATOMIC_RELAXED); }

void *malloc(size_t size)
{
    one_more();
    return __libc_malloc(size);
}

void *calloc(size_t count, size_t size)
{
    one_more();
    return __libc_calloc(count, size);
}

void *realloc(void *old, size_t size)
{
    one_more();
    return __libc_realloc(old, size);
}

void *memalign(size_t line, size_t size)
{
    one_more();
    return __libc_memalign(line, size);
}

void *aligned_alloc(size_t line, size_t size)
{
    one_more();
    return __libc_memalign(line, size);
}

int posix_memalign(void **out, size_t line, size_t size)
{
    one_more();
    *out = __libc_memalign(line, size);
    return *out ? 0 : 12; /* ENOMEM */
}

#if defined(PLAY)
#include <stdio.h>
#include <stdlib.h>

#include "sparsefold.h"

enum { STREAMS = 19, STEPS = 8 };

static void expect(int held, const char *what)
{
    if (held) return;
    printf("%s\n", what);
    exit(1);
}

/* Or of a program that gives no score. */
static int scored(sparsefold_status status) { return status == SPARSEFOLD_OK || status == SPARSEFOLD_ERROR_ARGUMENT; }

static void play(const char *path, const char *isa, size_t threads)
{
    sparsefold_engine *engine;
    sparsefold_stream *streams[STREAMS];
    const sparsefold_info *info;
    int64_t tokens[STREAMS];
    float *x, *y;
    size_t i, s, t;
    uint64_t before;
    expect(sparsefold_load_file(path, isa, &engine, NULL, 0) == SPARSEFOLD_OK, "not loaded");
    expect(sparsefold_set_threads(engine, threads) == SPARSEFOLD_OK, "no threads");
    info = sparsefold_describe(engine);
    x = malloc(STREAMS * info->inputs * sizeof *x);
    y = malloc(STREAMS * info->outputs * sizeof *y);
    for (s = 0; s < STREAMS; ++s) streams[s] = sparsefold_stream_new(engine);
    before = allocations();
    expect(before > STREAMS, "the counter does not count");
    for (t = 0; t < STEPS; ++t) {
        for (i = 0; i < STREAMS * info->inputs; ++i) x[i] = (float)((i * 7 + t * 3) % 11) / 4 - 1;
        for (s = 0; s < STREAMS; ++s) tokens[s] = (int64_t)((s + t) % info->inputs);
        if (info->takes_tokens) {
            expect(sparsefold_step_token(streams[0], tokens[0], y) == SPARSEFOLD_OK, "step");
            expect(sparsefold_step_batch_tokens(engine, streams, STREAMS, tokens, y) == SPARSEFOLD_OK, "batch");
            for (i = 0; i < info->outputs; ++i)
                expect(scored(sparsefold_score_token(streams[0], tokens[0], (int64_t)i, y)), "score");
        } else {
            expect(sparsefold_step_values(streams[0], x, y) == SPARSEFOLD_OK, "step");
            expect(sparsefold_step_batch_values(engine, streams, STREAMS, x, y) == SPARSEFOLD_OK, "batch");
            for (i = 0; i < info->outputs; ++i) expect(scored(sparsefold_score_values(streams[0], x, (int64_t)i, y)), "score");
        }
    }
    before = allocations() - before;
    printf("%llu\n", (unsigned long long)before);
    for (s = 0; s < STREAMS; ++s) sparsefold_stream_free(streams[s]);
    sparsefold_free(engine);
    free(x);
    free(y);
}

/* program ISA THREADS FILE... */
int main(int count, char **words)
{
    int i;
    for (i = 3; i < count; ++i) play(words[i], words[1], (size_t)atol(words[2]));
    return 0;
}
#endif
