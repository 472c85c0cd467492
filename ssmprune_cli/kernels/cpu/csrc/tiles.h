/* Products by the processor's own instructions for bfloat16 matrices (amx.h), for which tokens are rounded too. One of them
 * multiplies 16 x 32 by 32 x 16 values and adds to 16 x 16 sums in float32.
 *
 * Weights lie in tiles of 32 inputs and 16 outputs, (P / 16, K / 32, parts, 16, 16, 2), as packing.pack_block lays them
 * out: inputs k and k + 16 of a tile are together, and both sizes are padded. With three parts, weights and tokens are
 * float32: a value of bfloat16 that is near, one for what is missing, and one for what is missing then. */
#ifndef SSMPRUNE_TILES_H
#define SSMPRUNE_TILES_H
#include "amx.h"

#define TILE 512 /* values of bfloat16 in a tile, of 32 inputs and 16 outputs or tokens */
#define GROUPS 4 /* of tokens that pass by a weight's tiles together */

/* Floats that a weight (K, P) in bfloat16 takes the room of, and those until the next 16 outputs. */
INLINE int64_t tiled_step(int64_t K, int64_t parts) { return (K + 31) / 32 * parts * TILE / 2; }
INLINE int64_t tiled_size(int64_t K, int64_t P, int64_t parts) { return (P + 15) / 16 * tiled_step(K, parts); }

/* `count` tokens of x[r] (K) as the parts that make them up, (K / 32, parts, MOST_ROWS, 32), with zeros up to whole tiles. */
void tile_rows(const float *const *x, int64_t count, int64_t K, int64_t parts, uint16_t *rows);
/* Their product with a weight, plus a bias if there is one. The next 16 or 32 columns are wanted: columns n ... of out[r],
 * which are `step` floats apart, or 0 if not evenly. */
void tile_product(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns, int64_t K,
                  int64_t parts, float *const *out, int64_t step, int64_t n);

/* The same of a few columns that fill no tile: nothing else is read or written. */
void tile_product_in_part(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t columns,
                          int64_t K, int64_t parts, float *const *out, int64_t n);

INLINE int64_t step_of(float *const *out, int64_t count) {
    int64_t step = count > 1 ? out[1] - out[0] : 0;
    for (int64_t r = 2; r < count; r++)
        if (out[r] - out[r - 1] != step) return 0;
    return step;
}

/* Columns n ... P of the same, with weight and bias from those columns on. */
INLINE void tile_columns(const uint16_t *rows, int64_t count, const float *weight, const float *bias, int64_t K, int64_t n,
                         int64_t P, int64_t parts, float *const *out) {
    int64_t step = step_of(out, count);
    for (; n < P; n += 32, weight += 2 * tiled_step(K, parts), bias += bias ? 32 : 0)
        if (P - n >= 32 || P - n == 16) tile_product(rows, count, weight, bias, P - n, K, parts, out, step, n);
        else tile_product_in_part(rows, count, weight, bias, P - n, K, parts, out, n);
}

/* A matrix with the rows of some samples of L: those of one are `l` apart, and samples `b`. */
typedef struct { float *data; int64_t columns, L, b, l; } Rows;

/* Where rows `row` ... are, from column n on; after `stop` the last one again. */
INLINE void place(Rows matrix, int64_t row, int64_t stop, int64_t n, int count, float **rows) {
    for (int r = 0; r < count; r++) {
        int64_t at = row + r < stop ? row + r : stop - 1;
        rows[r] = matrix.data + at / matrix.L * matrix.b + at % matrix.L * matrix.l + n;
    }
}

/* Floats of scratch memory that `tiled` needs for K channels. */
INLINE int64_t tiled_room(int64_t K, int64_t parts) { return GROUPS * MOST_ROWS * ((K + 31) / 32 * 32) * parts / 2; }

/* Rows `start` ... `stop` of out = x . weight, plus bias if there is one. */
INLINE void tiled(Rows x, const float *weight, const float *bias, Rows out, int64_t start, int64_t stop, int64_t parts,
                  uint16_t *scratch) {
    int64_t K = x.columns, each = tiled_room(K, parts) * 2 / GROUPS, count = group_size(start, stop);
    if (!count) return;
    int64_t groups = (stop - start + count - 1) / count, passes = (groups + GROUPS - 1) / GROUPS;
    float *from[MOST_ROWS], *to[GROUPS][MOST_ROWS];
    tiles_begin(count, 16);
    for (int64_t pass = 0; pass < passes; pass++) {
        int64_t first, last;
        share(groups, pass, passes, &first, &last);
        for (int64_t g = 0; g < last - first; g++) {
            int64_t row = start + (first + g) * count;
            place(x, row, stop, 0, (int)count, from);
            place(out, row, stop, 0, (int)count, to[g]);
            tile_rows((const float *const *)from, count, K, parts, scratch + g * each);
        }
        for (int64_t n = 0; n < out.columns; n += 32)
            for (int64_t g = 0; g < last - first; g++)
                tile_columns(scratch + g * each, count, weight + n / 16 * tiled_step(K, parts), bias ? bias + n : 0, K, n,
                             n + 32 < out.columns ? n + 32 : out.columns, parts, to[g]);
    }
}
#endif
