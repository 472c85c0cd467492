/* The inside of a Mamba block: for each direction the convolution, the projection to the scan's step sizes, B and C, and
 * the scan; then the sum of the directions and the gate. Glossary: fused_op.py.
 *
 * As many samples as there are threads go through it together, so that nothing in between leaves the caches. Each thread
 * first takes rows of them, and then channels. */
#ifndef SSMPRUNE_INNER_H
#define SSMPRUNE_INNER_H
#include "conv.h"
#include "product.h"
#include "scan.h"
#include "threads.h"

/* xz is (B, L, 2E), y (B, L, E), context (B, M, E), gap (G, B, S), gap_delta (G, E), sources (G, B, T, K), size (B, S). The
 * second of the G directions scans in reverse. `parameters` are as packing.pack_inner lays them out.
 *
 * T tokens are convolved, and scans take S steps: L of both, or more. With `slots` (B, S) every token has a step, and is
 * read into that row of y, or not for -1. With `cells` (B, L), which have the end of each token's cell among the T tokens,
 * its step is that of the cell's mean, in which it is row `read` (B, L), and others count `mass` times as much. */
ARGUMENTS(Inner,
    const void *xz, *context;
    void *y;
    float *ungated; /* (B, L, E): the sum of the directions before the gate, if it is wanted */
    const float *parameters, *gap, *gap_delta;
    const float *size;
    const int64_t *sources, *slots, *cells, *read;
    uint16_t *rows; /* room for what tile_rows or byte_rows gives of E channels, if `way` is TILES or BYTES */
    int64_t batch, length, channels, state, width, rank, directions, others, xz_b, xz_l, y_b, context_b, context_l;
    int64_t half, threads, way, parts, dots, tokens, steps;
    /* Of a piece of sequences of `whole` tokens, in float32 and one direction: `before` rows of xz in front of the first one
     * are of tokens that the convolution still sees, and the scan's states (N, E) are `carry` floats into the sample's
     * scratch memory. They come from the piece before, if it has `begun`. gap, size and ungated begin with the piece. */
    int64_t whole, before, carry, begun;
    double scale, mass;
);

/* The parameters of one direction. P = R + 2N; x_weight as `way` has it. */
typedef struct {
    const float *taps, *x_weight, *dt_weight, *A; /* (K, E), (E, P), (R, E), (N, E) */
    const float *conv_bias, *dt_bias, *D;         /* (E) */
} Parameters;

INLINE int64_t projected(const Inner *a) { return a->rank + 2 * a->state; }
/* Floats from one token's projection to the next, in whole vectors. */
INLINE int64_t padded(const Inner *a) { return (projected(a) + W - 1) / W * W; }
/* Floats of a weight (K, P). */
INLINE int64_t weight_size(int64_t K, int64_t P, int64_t way, int64_t parts) {
    return way == FLOATS ? K * P : way == BYTES ? byte_size(K, P) : tiled_size(K, P, parts);
}
/* Floats of x_weight, and of all parameters of one direction. */
INLINE int64_t x_weight_size(const Inner *a) { return weight_size(a->channels, projected(a), a->way, a->parts); }
INLINE int64_t parameter_count(const Inner *a) {
    return a->channels * (a->width + a->rank + a->state + 3) + x_weight_size(a);
}

INLINE Parameters parameters_of(const Inner *a, int64_t g) {
    int64_t E = a->channels;
    Parameters p;
    p.taps = a->parameters + g * parameter_count(a);
    p.x_weight = p.taps + a->width * E;
    p.dt_weight = p.x_weight + x_weight_size(a);
    p.A = p.dt_weight + a->rank * E;
    p.conv_bias = p.A + a->state * E;
    p.dt_bias = p.conv_bias + E;
    p.D = p.dt_bias + E;
    return p;
}

/* Scratch memory of one sample: u (G, S, E), then rank values, B and C (G, S, padded), and with cells the tokens' own
 * values (G, L, E). In whole vectors. */
INLINE int64_t own_at(const Inner *a) { return a->directions * a->steps * (a->channels + padded(a)); }
INLINE int64_t inner_scratch(const Inner *a) {
    return (own_at(a) + (a->cells ? a->directions * a->length * a->channels : 0) + 15) / 16 * 16;
}

/* Of the samples `first` ... `first + count` the rows that the calling thread takes: their u, and their rank values, B and
 * C, into the samples' scratch memory, `size` floats each. Returns whether a source is missing. */
int feed_rows(const Inner *a, int64_t first, int64_t count, float *scratch, int64_t size);

/* Of the same samples the channels that it takes: scans, sum and gate, into y. Returns 1 when memory ran out. */
int scan_channels(const Inner *a, int64_t first, int64_t count, float *scratch, int64_t size);
#endif
