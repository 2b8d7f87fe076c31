/* Threads on one engine, for the thread sanitizer: two threads step streams of their own and batches that the engine's threads
 * share, both at once, and both want one stream more. What each computes is compared with one thread alone.
 *
 *     threads FILE...
 *
 * Built and run by tests/native/test_sanitizers.py. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "sparsefold.h"

enum { STREAMS = 9, STEPS = 30 };

static sparsefold_engine *engine;
static const sparsefold_info *info;
static sparsefold_stream *wanted_by_both;

static void expect(int held, const char *what)
{
    if (held) return;
    fprintf(stderr, "%s\n", what);
    exit(1);
}

/* One batch of STREAMS, or each stream by itself; the inputs depend on `seed` and `t`. */
static void step(sparsefold_stream **streams, size_t seed, size_t t, int batch, float *x, float *y)
{
    int64_t tokens[STREAMS];
    size_t i, s;
    for (i = 0; i < STREAMS * info->inputs; ++i) x[i] = (float)((i * 7 + t * 3 + seed) % 11) / 4 - 1;
    for (s = 0; s < STREAMS; ++s) tokens[s] = (int64_t)((s + t + seed) % info->inputs);
    if (batch) {
        expect((info->takes_tokens ? sparsefold_step_batch_tokens(engine, streams, STREAMS, tokens, y)
                                   : sparsefold_step_batch_values(engine, streams, STREAMS, x, y)) == SPARSEFOLD_OK,
               "a batch was refused");
        return;
    }
    for (s = 0; s < STREAMS; ++s)
        expect((info->takes_tokens ? sparsefold_step_token(streams[s], tokens[s], y + s * info->outputs)
                                   : sparsefold_step_values(streams[s], x + s * info->inputs, y + s * info->outputs)) ==
                   SPARSEFOLD_OK,
               "a step was refused");
}

/* All outputs of STEPS steps; `mixed`: every third step is played stream by stream, the others are batches. */
static float *play(size_t seed, int mixed)
{
    sparsefold_stream *streams[STREAMS];
    const size_t size = STREAMS * info->outputs;
    float *x = malloc(STREAMS * info->inputs * sizeof *x), *all = malloc(STEPS * size * sizeof *all);
    float *unused = malloc(info->outputs * sizeof *unused);
    size_t s, t;
    for (s = 0; s < STREAMS; ++s) streams[s] = sparsefold_stream_new(engine);
    for (t = 0; t < STEPS; ++t) {
        step(streams, seed, t, mixed && t % 3, x, all + t * size);
        if (mixed) {
            const sparsefold_status status = info->takes_tokens
                                                 ? sparsefold_step_batch_tokens(engine, &wanted_by_both, 1,
                                                                                (int64_t[]){0}, unused)
                                                 : sparsefold_step_batch_values(engine, &wanted_by_both, 1, x, unused);
            expect(status == SPARSEFOLD_OK || status == SPARSEFOLD_ERROR_BUSY, "the shared stream");
        }
    }
    for (s = 0; s < STREAMS; ++s) sparsefold_stream_free(streams[s]);
    free(x);
    free(unused);
    return all;
}

static void *work(void *seed) { return play((size_t)seed, 1); }

static void play_file(const char *path)
{
    pthread_t threads[2];
    size_t i;
    char message[200];
    expect(sparsefold_load_file(path, NULL, &engine, message, sizeof message) == SPARSEFOLD_OK, message);
    info = sparsefold_describe(engine);
    expect(sparsefold_set_threads(engine, 3) == SPARSEFOLD_OK, "no threads");
    wanted_by_both = sparsefold_stream_new(engine);
    for (i = 0; i < 2; ++i) expect(pthread_create(&threads[i], NULL, work, (void *)i) == 0, "no thread");
    for (i = 0; i < 2; ++i) {
        void *found;
        float *alone;
        pthread_join(threads[i], &found);
        alone = play(i, 0);
        expect(memcmp(found, alone, STEPS * STREAMS * info->outputs * sizeof *alone) == 0, "other bits than alone");
        free(found);
        free(alone);
    }
    sparsefold_stream_free(wanted_by_both);
    sparsefold_free(engine);
}

int main(int count, char **words)
{
    int i;
    for (i = 1; i < count; ++i) play_file(words[i]);
    puts("ok");
    return 0;
}
