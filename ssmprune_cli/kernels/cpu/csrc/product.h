/* Products of rows of tokens with a weight: a few rows and columns at a time in registers, in one of four ways. */
#ifndef SSMPRUNE_PRODUCT_H
#define SSMPRUNE_PRODUCT_H
#include "bytes.h"

/* How a product goes. FLOATS: float32 weights (K, P). PAIRS: weights in bfloat16, in one part, by float32 instructions.
 * TILES: see tiles.h. BYTES: see bytes.h. */
enum { FLOATS, PAIRS, TILES, BYTES };

/* Tokens and vectors of outputs that are in registers together. */
#define TILE_ROWS (W == 16 ? 6 : 4)
#define TILE_VECTORS (W == 16 ? 4 : 3)

#define ROWS _Pragma("GCC unroll 8") for (int r = 0; r < TILE_ROWS; r++)
#define VECTORS _Pragma("GCC unroll 4") for (int v = 0; v < vectors; v++)

/* The sums to columns n ... of out[r]; what is beyond column P stays as it is. */
#define STORE_SUMS                                                                       \
    do {                                                                                 \
        if (n + vectors * W <= P) {                                                      \
            ROWS VECTORS store(out[r], n + v * W, sum[r][v], W, 0);                      \
        } else {                                                                         \
            ROWS VECTORS {                                                               \
                int64_t left = P - n - v * W;                                            \
                store(out[r], n + v * W, sum[r][v], left < W ? (int)left : W, 0);        \
            }                                                                            \
        }                                                                                \
    } while (0)

/* Columns n ... n + vectors * W of out[r] (P) = x[r] (K) . weight (K, P), for TILE_ROWS tokens. */
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
    STORE_SUMS;
}

/* The same with weights in bfloat16. */
INLINE void pair_columns(const float *const *x, const float *weight, int64_t K, int64_t P, int64_t n, int vectors,
                         float *const *out) {
    vf sum[TILE_ROWS][TILE_VECTORS], first[TILE_VECTORS], second[TILE_VECTORS];
    ROWS VECTORS sum[r][v] = (vf){0};
    for (int64_t tile = 0; tile < K; tile += 32)
        for (int64_t k = tile; k < tile + 16 && k < K; k++) {
            VECTORS {
                int64_t at = n + v * W;
                vu both = (vu)load(weight, at / 16 * tiled_step(K, 1) + (k - tile / 2) * 16 + at % 16, W, 0);
                first[v] = (vf)(both << 16), second[v] = (vf)(both & 0xFFFF0000);
            }
            ROWS VECTORS sum[r][v] += first[v] * x[r][k];
            if (k + 16 >= K) continue;
            ROWS VECTORS sum[r][v] += second[v] * x[r][k + 16];
        }
    STORE_SUMS;
}
#undef STORE_SUMS
#undef ROWS
#undef VECTORS

/* All columns, by FLOATS or PAIRS. */
INLINE void product(int way, const float *const *x, const float *weight, int64_t K, int64_t P, float *const *out) {
#define COLUMNS(vectors)                                                            \
    do {                                                                            \
        if (way == FLOATS) float_columns(x, weight, K, P, n, vectors, out);         \
        else pair_columns(x, weight, K, P, n, vectors, out);                        \
    } while (0)
    int64_t n = 0;
    for (; P - n > (TILE_VECTORS - 1) * W; n += TILE_VECTORS * W) COLUMNS(TILE_VECTORS);
    if (P - n > 2 * W) COLUMNS(3);
    else if (P - n > W) COLUMNS(2);
    else if (P > n) COLUMNS(1);
#undef COLUMNS
}
#endif
