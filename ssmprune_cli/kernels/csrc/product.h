/* Products of rows of tokens with a weight: a few rows and columns at a time in registers, in one of three ways. */
#ifndef SSMPRUNE_PRODUCT_H
#define SSMPRUNE_PRODUCT_H
#include "vectors.h"

/* How a product goes. FLOATS: float32 weights (K, P). The others have weights in bfloat16 as packing.pack_block lays them out,
 * that is in tiles of 32 inputs and 16 outputs, (P / 16, K / 32, parts, 16, 16, 2): inputs k and k + 16 of a tile lie
 * together, and both sizes are padded. PAIRS: one part, of which the weights are, by float32 instructions. TILES: by the
 * processor's own products of bfloat16 matrices (AMX), for which the tokens are rounded too. With three parts, weights and
 * tokens are float32: a value of bfloat16 that is near, one for what is missing, and one for what is missing then. */
enum { FLOATS, PAIRS, TILES };

/* Tokens and vectors of outputs that are in registers together. */
#define TILE_ROWS (W == 16 ? 6 : 4)
#define TILE_VECTORS (W == 16 ? 4 : 3)
#define MOST_ROWS 32 /* tokens that are together with TILES, at most */
#define TILE 512     /* values of bfloat16 in a tile, of 32 inputs and 16 outputs or tokens */

#define ROWS _Pragma("GCC unroll 8") for (int r = 0; r < TILE_ROWS; r++)
#define VECTORS _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)

/* Columns n ... n + vectors * W of out[r] (P, rounded up to vectors) = x[r] (K) . weight (K, P), for TILE_ROWS tokens. */
INLINE void float_columns(const float *const *x, const float *weight, int64_t K, int64_t P, int64_t n, int vectors,
                          float *const *out) {
    vf sum[TILE_ROWS][TILE_VECTORS], w[TILE_VECTORS];
    int64_t past = n + vectors * W - P; /* columns that are not there: the next row's first ones, or beyond the end */
    int64_t inside = past > 0 ? K - (past + P - 1) / P : K;
    ROWS VECTORS sum[r][v] = (vf){0};
    for (int64_t k = 0; k < inside; k++) {
        VECTORS w[v] = load(weight, k * P + n + v * W, W, 0);
        ROWS VECTORS sum[r][v] += w[v] * x[r][k];
    }
    for (int64_t k = inside < 0 ? 0 : inside; k < K; k++)
        VECTORS {
            int64_t left = P - n - v * W;
            vf last = load(weight, k * P + n + v * W, left < W ? (int)left : W, 0);
            ROWS sum[r][v] += last * x[r][k];
        }
    ROWS VECTORS store(out[r], n + v * W, sum[r][v], W, 0);
}

/* Floats that a weight (K, P) in bfloat16 takes the room of, and those until the next 16 outputs. */
INLINE int64_t tiled_step(int64_t K, int64_t parts) { return (K + 31) / 32 * parts * TILE / 2; }
INLINE int64_t tiled_size(int64_t K, int64_t P, int64_t parts) { return (P + 15) / 16 * tiled_step(K, parts); }

/* The same with weights in bfloat16, for a K that 32 divides. */
INLINE void pair_columns(const float *const *x, const float *weight, int64_t K, int64_t n, int vectors, float *const *out) {
    vf sum[TILE_ROWS][TILE_VECTORS], first[TILE_VECTORS], second[TILE_VECTORS];
    ROWS VECTORS sum[r][v] = (vf){0};
    for (int64_t tile = 0; tile < K; tile += 32)
        for (int64_t k = tile; k < tile + 16; k++) {
            VECTORS {
                int64_t at = n + v * W;
                vu both = (vu)load(weight, at / 16 * tiled_step(K, 1) + (k - tile / 2) * 16 + at % 16, W, 0);
                first[v] = (vf)(both << 16), second[v] = (vf)(both & 0xFFFF0000);
            }
            ROWS VECTORS sum[r][v] += first[v] * x[r][k];
            ROWS VECTORS sum[r][v] += second[v] * x[r][k + 16];
        }
    ROWS VECTORS store(out[r], n + v * W, sum[r][v], W, 0);
}
#undef ROWS
#undef VECTORS

/* All columns, by FLOATS or PAIRS. */
INLINE void product(int way, const float *const *x, const float *weight, int64_t K, int64_t P, float *const *out) {
#define COLUMNS(vectors)                                                            \
    do {                                                                            \
        if (way == FLOATS) float_columns(x, weight, K, P, n, vectors, out);         \
        else pair_columns(x, weight, K, n, vectors, out);                           \
    } while (0)
    int64_t n = 0;
    for (; P - n > (TILE_VECTORS - 1) * W; n += TILE_VECTORS * W) COLUMNS(TILE_VECTORS);
    if (P - n > 2 * W) COLUMNS(3);
    else if (P - n > W) COLUMNS(2);
    else if (P > n) COLUMNS(1);
#undef COLUMNS
}

/* By TILES: whether the processor and the system have them. */
int tiles_available(void);
/* Before a thread uses them for groups of `count` tokens, and after it did. */
void tiles_begin(int64_t count);
void tiles_end(void);

/* Tokens of a group, if those from `start` to `stop` are in as few groups of one size as there can be. */
INLINE int64_t group_size(int64_t start, int64_t stop) {
    int64_t groups = (stop - start + MOST_ROWS - 1) / MOST_ROWS;
    return groups ? (stop - start + groups - 1) / groups : 0;
}

/* `count` tokens of x[r] (K) as the parts that make them up, (K / 32, parts, MOST_ROWS, 32), for a K that 32 divides. */
void tile_rows(const float *const *x, int64_t count, int64_t K, int64_t parts, uint16_t *rows);
/* Their product with a weight, of which the next 16 or 32 columns are wanted: columns n ... of out[r], which are `step`
 * floats apart, or 0 if not evenly. */
void tile_product(const uint16_t *rows, int64_t count, const float *weight, int64_t columns, int64_t K, int64_t parts,
                  float *const *out, int64_t step, int64_t n);

INLINE int64_t step_of(float *const *out, int64_t count) {
    int64_t step = count > 1 ? out[1] - out[0] : 0;
    for (int64_t r = 2; r < count; r++)
        if (out[r] - out[r - 1] != step) return 0;
    return step;
}

/* Columns n ... P of their product with a weight, from those columns on. */
INLINE void tile_columns(const uint16_t *rows, int64_t count, const float *weight, int64_t K, int64_t n, int64_t P,
                         int64_t parts, float *const *out) {
    int64_t step = step_of(out, count);
    for (; n < P; n += 32, weight += 2 * tiled_step(K, parts))
        tile_product(rows, count, weight, P - n, K, parts, out, step, n);
}
#endif
