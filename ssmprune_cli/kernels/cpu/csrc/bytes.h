/* Products of rows of tokens with a weight in eight bits. Each output has a scale of its own, and each token gets one when
 * its values are put into eight bits: a sum of products of integers is exact, and is scaled once.
 *
 * A weight (K, P) lies in panels of BYTE_PANEL outputs: four inputs of an output side by side, as one instruction takes
 * them, (K / 4, BYTE_PANEL, 4), then the outputs' scales, then 128 times the sum of each one's weights: tokens are stored
 * with 128 added, since that instruction takes one unsigned factor. All is padded with zeros to whole panels and fours. */
#ifndef SSMPRUNE_BYTES_H
#define SSMPRUNE_BYTES_H
#include "tiles.h"

/* How products are made, the slowest first: of pairs of 16 bits; of fours of bytes in one instruction (AVX512-VNNI, or
 * AVX-VNNI, which has half as wide vectors); of tiles (AMX). */
enum { PAIRS_OF_BYTES, FOURS_OF_BYTES, TILES_OF_BYTES };

#define BYTE_PANEL 64
#define BYTE_TOKENS (W == 16 ? 6 : 4) /* whose sums are in registers together */
#define BYTE_GROUP 96                 /* tokens that pass by a weight together: a multiple of BYTE_TOKENS and MOST_ROWS */

/* Fours of inputs, and those of a tile. */
INLINE int64_t quads(int64_t K) { return (K + 3) / 4; }
INLINE int64_t byte_depth(int64_t K) { return quads(K) < 16 ? quads(K) : 16; }
/* Bytes from a token to the next: whole tiles. */
INLINE int64_t byte_step(int64_t K) { return (quads(K) + 15) / 16 * 64; }
/* Floats that a panel of a weight (K, P), and all of it, take the room of. */
INLINE int64_t byte_panel(int64_t K) { return BYTE_PANEL * (quads(K) + 2); }
INLINE int64_t byte_size(int64_t K, int64_t P) { return (P + BYTE_PANEL - 1) / BYTE_PANEL * byte_panel(K); }
/* Floats of scratch memory for a group of tokens of K channels. */
INLINE int64_t byte_room(int64_t K) { return BYTE_GROUP * (byte_step(K) / 4 + 1); }

/* A weight of values (P, K) and scales (P) in panels: byte_size floats. */
void pack_bytes(const int8_t *values, const float *scales, int64_t K, int64_t P, float *weight);

/* The best way to make products that the processor has, but none beyond `most`. */
int best_dots(int most);

/* `count` tokens x[r] (K) in eight bits, byte_step(K) bytes each, for products made as `dots` says; the scale of token r
 * goes to scales[r]. A token that is not finite gets a scale that is not a number. */
void byte_rows(const float *const *x, int64_t count, int64_t K, int dots, uint8_t *bytes, float *scales);

/* Columns 0 ... `columns` of out[r] = token r . panel, plus bias if there is one, for BYTE_TOKENS tokens, whose `bytes` are
 * in a row; or with TILES_OF_BYTES for the `count` that tiles_begin was told of. */
void byte_product(const uint8_t *bytes, const float *scales, int64_t count, const float *panel, const float *bias, int64_t K,
                  int64_t columns, int dots, float *const *out);
void byte_tile_product(const uint8_t *bytes, const float *scales, int64_t count, const float *panel, const float *bias,
                       int64_t K, int64_t columns, float *const *out);

/* Tokens that are together, of those from `start` to `stop`. */
INLINE int64_t byte_together(int64_t start, int64_t stop, int dots) {
    return dots == TILES_OF_BYTES ? group_size(start, stop) : BYTE_TOKENS;
}

/* W outputs, the first of which is n of the panel whose scales are at `end`, from their sums. The product is rounded before
 * a bias is added: in one rounding, as a compiler makes of both in some places, an output would depend on which token of
 * the group it is of. */
INLINE vf scaled(vi sum, float token_scale, const float *end, int64_t n, const float *bias, int lanes) {
    vf scale = load(end, n, W, 0), shift = load(end, BYTE_PANEL + n, W, 0);
    vf total = __builtin_convertvector(sum - (vi)shift, vf) * (scale * token_scale);
    if (bias) {
        __asm__("" : "+m"(total));
        total += load(bias, n, lanes, 0);
    }
    return total;
}

/* Rows `start` ... `stop` of out = x . weight, plus bias if there is one. `room`: byte_room floats. */
INLINE void eight_bit(Rows x, const float *weight, const float *bias, Rows out, int64_t start, int64_t stop, int dots,
                      float *room) {
    int64_t K = x.columns, step = byte_step(K), together = byte_together(start, stop, dots);
    float *scales = room + BYTE_GROUP * step / 4, *from[BYTE_GROUP], *to[BYTE_GROUP];
    uint8_t *bytes = (uint8_t *)room;
    if (start == stop) return;
    if (dots == TILES_OF_BYTES) tiles_begin(together, byte_depth(K));
    for (int64_t first = start, group = BYTE_GROUP / together * together; first < stop; first += group) {
        int64_t count = stop - first < group ? (stop - first + together - 1) / together * together : group;
        place(x, first, stop, 0, (int)count, from), place(out, first, stop, 0, (int)count, to);
        byte_rows((const float *const *)from, count, K, dots, bytes, scales);
        for (int64_t n = 0; n < out.columns; n += BYTE_PANEL) {
            const float *panel = weight + n / BYTE_PANEL * byte_panel(K);
            int64_t columns = out.columns - n < BYTE_PANEL ? out.columns - n : BYTE_PANEL;
            for (int64_t r = 0; r < count; r += together)
                byte_product(bytes + r * step, scales + r, together, panel, bias ? bias + n : 0, K, columns, dots, to + r);
            for (int64_t r = 0; r < count; r++) to[r] += BYTE_PANEL;
        }
    }
}
#endif
