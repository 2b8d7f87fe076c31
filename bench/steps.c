/* Times one step of a program, called from C. Built and run by bench/steps.py, in two ways:
 *
 *     cc steps.c libsparsefold.a -lstdc++ -lm             through include/sparsefold.h
 *     cc -DEXPORTED -I folder steps.c folder/net.c -lm    what `sparsefold export-c` wrote; MODEL is not read
 *
 *     steps MODEL INPUTS PARITY WARMUP
 *
 * INPUTS holds float32 values, one group for each step. PARITY steps are played first and their outputs printed, then WARMUP
 * steps, then all steps are timed, one by one, the state going on. Prints one JSON object: isa, outputs, ns.
 */
#define _POSIX_C_SOURCE 199309L /* clock_gettime */
#include <inttypes.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#ifdef EXPORTED
#include "net.h"

static net_state state;
static size_t inputs = NET_INPUTS, outputs = NET_OUTPUTS;
static const char *isa = "exported";

static int open_model(const char *path)
{
    (void)path;
    net_reset(&state);
    return 0;
}

static int step(const float *x, float *y)
{
    return net_step(&state, x, y);
}
#else
#include "sparsefold.h"

static sparsefold_stream *stream;
static size_t inputs, outputs;
static const char *isa;

static int open_model(const char *path)
{
    char message[400];
    sparsefold_engine *engine;
    const sparsefold_info *info;
    if (sparsefold_load_file(path, NULL, &engine, message, sizeof message) != SPARSEFOLD_OK) {
        fprintf(stderr, "steps: %s\n", message);
        return 1;
    }
    info = sparsefold_describe(engine);
    inputs = info->inputs;
    outputs = info->outputs;
    isa = info->isa;
    stream = sparsefold_stream_new(engine);
    return !stream || info->takes_tokens;
}

static int step(const float *x, float *y)
{
    return sparsefold_step_values(stream, x, y) != SPARSEFOLD_OK;
}
#endif

static int64_t nanoseconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000000 + now.tv_nsec;
}

int main(int count, char **words)
{
    size_t steps, parity, warmup, t, i;
    long size;
    FILE *file;
    float *x, *y;
    int64_t *ns;
    if (count != 5 || open_model(words[1]) || !(file = fopen(words[2], "rb"))) return 2;
    parity = strtoul(words[3], NULL, 10);
    warmup = strtoul(words[4], NULL, 10);
    if (fseek(file, 0, SEEK_END) || (size = ftell(file)) < 0) return 2;
    rewind(file);
    steps = (size_t)size / (inputs * sizeof *x);
    x = malloc((size_t)size);
    y = malloc(outputs * sizeof *y);
    ns = malloc(steps * sizeof *ns);
    if (!x || !y || !ns || parity > steps || fread(x, inputs * sizeof *x, steps, file) != steps) return 2;
    fclose(file);

    printf("{\"isa\": \"%s\", \"outputs\": [", isa);
    for (t = 0; t < parity; ++t) {
        if (step(x + t * inputs, y)) return 2;
        for (i = 0; i < outputs; ++i) printf(t || i ? ", %.9g" : "%.9g", (double)y[i]);
    }
    for (t = 0; t < warmup; ++t)
        if (step(x + t % steps * inputs, y)) return 2;
    for (t = 0; t < steps; ++t) {
        const int64_t began = nanoseconds();
        if (step(x + t * inputs, y)) return 2;
        ns[t] = nanoseconds() - began;
    }
    printf("], \"ns\": [");
    for (t = 0; t < steps; ++t) printf(t ? ", %" PRId64 : "%" PRId64, ns[t]);
    printf("]}\n");
    return 0;
}
