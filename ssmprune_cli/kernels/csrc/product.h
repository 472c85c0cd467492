/* Products of rows of tokens with a weight: a few rows and columns at a time in registers, in one of three ways. */
#ifndef SSMPRUNE_PRODUCT_H
#define SSMPRUNE_PRODUCT_H
#include "vectors.h"

/* How a product goes: float32 weights (K, P); bfloat16 weights whose inputs 2k and 2k + 1 lie together, (K / 2, P, 2); or
 * the same weights and the processor's own products of bfloat16 matrices (AMX), which round the tokens to bfloat16 too. */
enum { FLOATS, PAIRS, TILES };

/* Tokens and vectors of outputs that are in registers together. */
#define TILE_ROWS (W == 16 ? 6 : 4)
#define TILE_VECTORS (W == 16 ? 4 : 3)
#define MOST_ROWS 32 /* tokens that are together with TILES */

INLINE int rows_together(int way) { return way == TILES ? MOST_ROWS : TILE_ROWS; }

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

/* Columns a pair's weights have room for. */
INLINE int64_t pair_columns_of(int64_t P) { return (P + 15) / 16 * 16; }

/* The same with a weight of pairs, for an even K. */
INLINE void pair_columns(const float *const *x, const float *weight, int64_t K, int64_t P, int64_t n, int vectors,
                         float *const *out) {
    vf sum[TILE_ROWS][TILE_VECTORS], first[TILE_VECTORS], second[TILE_VECTORS];
    int64_t stride = pair_columns_of(P);
    ROWS VECTORS sum[r][v] = (vf){0};
    for (int64_t k = 0; k < K; k += 2) {
        VECTORS {
            vu both = (vu)load(weight, k / 2 * stride + n + v * W, W, 0);
            first[v] = (vf)(both << 16), second[v] = (vf)(both & 0xFFFF0000);
        }
        ROWS VECTORS sum[r][v] += first[v] * x[r][k];
        ROWS VECTORS sum[r][v] += second[v] * x[r][k + 1];
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
        else pair_columns(x, weight, K, P, n, vectors, out);                        \
    } while (0)
    int64_t n = 0;
    for (; P - n > (TILE_VECTORS - 1) * W; n += TILE_VECTORS * W) COLUMNS(TILE_VECTORS);
    if (P - n > 2 * W) COLUMNS(3);
    else if (P - n > W) COLUMNS(2);
    else if (P > n) COLUMNS(1);
#undef COLUMNS
}

/* By TILES: whether the processor and the system have them; before and after a thread uses them. */
int tiles_available(void);
void tiles_begin(void);
void tiles_end(void);
/* MOST_ROWS tokens of x[r] (K) in bfloat16, (MOST_ROWS, K), for a K that 32 divides. */
void round_rows(const float *const *x, int64_t K, uint16_t *rounded);
/* Their product with a weight of pairs: out[r] (P, rounded up to 16). */
void tile_product(const uint16_t *rounded, const float *weight, int64_t K, int64_t P, float *const *out);
#endif
