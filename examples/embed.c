/* Plays a compiled program from C99:
 *
 *     embed model.sfold < numbers     one step for each token id, or for each group of `inputs` values, on standard input
 *     embed model.sfold 100           100 steps of its own: the likeliest token is fed back, or zeros are read
 *
 * One line of outputs a step goes to standard output, with digits enough to be read back exactly; the time of a step to
 * standard error.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#include "sparsefold.h"

static double microseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1e6 * (double)now.tv_sec + 1e-3 * (double)now.tv_nsec;
}

static size_t likeliest(const float *y, size_t n)
{
    size_t best = 0, i;
    for (i = 1; i < n; ++i)
        if (y[i] > y[best]) best = i;
    return best;
}

/* 1 when a whole step was read, 0 at the end of the input, -1 when it stops in between or is no number. */
static int read_step(const sparsefold_info *info, int64_t *token, float *x)
{
    size_t i;
    if (info->takes_tokens) {
        const int got = scanf("%" SCNd64, token);
        return got == 1 ? 1 : got == EOF ? 0 : -1;
    }
    for (i = 0; i < info->inputs; ++i) {
        const int got = scanf("%f", &x[i]);
        if (got != 1) return got == EOF && i == 0 ? 0 : -1;
    }
    return 1;
}

static int play(sparsefold_stream *stream, const sparsefold_info *info, long generate, float *x, float *y)
{
    int64_t token = 0;
    double spent = 0, began;
    uint64_t steps = 0;
    size_t one = 1, i;
    while (generate < 0 || (uint64_t)generate > steps) {
        sparsefold_status status;
        if (generate < 0) {
            const int got = read_step(info, &token, x);
            if (got == 0) break;
            if (got < 0) {
                fprintf(stderr, "embed: the input is not a list of numbers, %s a step.\n",
                        info->takes_tokens ? "one" : "as many as the program has inputs");
                return 2;
            }
        }
        began = microseconds();
        status = info->takes_tokens ? sparsefold_step_token(stream, token, y) : sparsefold_step_values(stream, x, y);
        spent += microseconds() - began;
        if (status != SPARSEFOLD_OK) {
            fprintf(stderr, "embed: %s\n", sparsefold_status_text(status));
            return 2;
        }
        for (i = 0; i < info->outputs; ++i) printf(i ? " %.9g" : "%.9g", (double)y[i]);
        printf("\n");
        token = (int64_t)(likeliest(y, info->outputs) % info->inputs);
        sparsefold_counters(stream, 0, SPARSEFOLD_STEPS, &steps, &one);
    }
    fprintf(stderr, "%" PRIu64 " steps, %.2f us each, %s kernels\n", steps, steps ? spent / (double)steps : 0.0, info->isa);
    return 0;
}

int main(int count, char **words)
{
    char message[400], *end = NULL;
    sparsefold_engine *engine;
    sparsefold_stream *stream;
    const sparsefold_info *info;
    float *x, *y;
    long generate = -1;
    int result = 2;
    if (count == 3) generate = strtol(words[2], &end, 10);
    if (count < 2 || count > 3 || (end && (*end || end == words[2] || generate < 0))) {
        fprintf(stderr, "usage: embed FILE [STEPS]\n");
        return 2;
    }
    if (sparsefold_load_file(words[1], NULL, &engine, message, sizeof message) != SPARSEFOLD_OK) {
        fprintf(stderr, "embed: %s\n", message);
        return 2;
    }
    info = sparsefold_describe(engine);
    stream = sparsefold_stream_new(engine);
    x = calloc(info->takes_tokens ? 1 : info->inputs, sizeof *x);
    y = calloc(info->outputs, sizeof *y);
    if (stream && x && y)
        result = play(stream, info, generate, x, y);
    else
        fprintf(stderr, "embed: %s\n", sparsefold_status_text(SPARSEFOLD_ERROR_MEMORY));
    free(y);
    free(x);
    sparsefold_stream_free(stream);
    sparsefold_free(engine);
    return result;
}
