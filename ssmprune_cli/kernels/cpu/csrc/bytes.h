/* Products of rows of tokens with a weight in eight bits. Each output has a scale of its own, and each token gets one when
 * its values are put into eight bits: a sum of products of integers is exact, and is scaled once.
 *
 * A weight (K, P) lies in panels of BYTE_PANEL outputs: four inputs of an output side by side, as one instruction takes
 * them, (K / 4, BYTE_PANEL, 4), then the outputs' scales, then 128 times the sum of each one's weights: tokens are stored
 * with 128 added, since that instruction takes one unsigned factor. All is padded with zeros to whole panels and fours. */
#ifndef SSMPRUNE_BYTES_H
#define SSMPRUNE_BYTES_H
#include "tiles.h"

#define BYTE_PANEL 64
#define BYTE_TOKENS (W == 16 ? 6 : 4) /* whose sums are in registers together */
#define BYTE_GROUP 96                 /* tokens that pass by a weight together: a multiple of BYTE_TOKENS */

/* Fours of inputs. */
INLINE int64_t quads(int64_t K) { return (K + 3) / 4; }
/* Floats that a panel of a weight (K, P), and all of it, take the room of. */
INLINE int64_t byte_panel(int64_t K) { return BYTE_PANEL * (quads(K) + 2); }
INLINE int64_t byte_size(int64_t K, int64_t P) { return (P + BYTE_PANEL - 1) / BYTE_PANEL * byte_panel(K); }
/* Floats of scratch memory for a group of tokens of K channels. */
INLINE int64_t byte_room(int64_t K) { return BYTE_GROUP * (quads(K) + 1); }

/* Whether the processor multiplies fours of bytes in one instruction (AVX512-VNNI). Without, pairs are multiplied. */
int byte_products_available(void);

/* `count` tokens x[r] (K) in eight bits, 4 quads(K) bytes each; the scale of token r goes to scales[r]. A token that is not
 * finite gets a scale that is not a number. */
void byte_rows(const float *const *x, int64_t count, int64_t K, uint8_t *bytes, float *scales);

/* Columns 0 ... `columns` of out[r] = token r . panel, plus bias if there is one, for BYTE_TOKENS tokens, whose `bytes` are
 * in a row. `dots`: by the instruction for fours. */
void byte_product(const uint8_t *bytes, const float *scales, const float *panel, const float *bias, int64_t K,
                  int64_t columns, int dots, float *const *out);

/* Rows `start` ... `stop` of out = x . weight, plus bias if there is one. `room`: byte_room floats. */
INLINE void eight_bit(Rows x, const float *weight, const float *bias, Rows out, int64_t start, int64_t stop, int dots,
                      float *room) {
    int64_t K = x.columns, step = 4 * quads(K);
    float *scales = room + BYTE_GROUP * quads(K);
    uint8_t *bytes = (uint8_t *)room;
    for (int64_t first = start; first < stop; first += BYTE_GROUP) {
        int64_t last = first + BYTE_GROUP < stop ? first + BYTE_GROUP : stop;
        for (int64_t row = first; row < last; row += BYTE_TOKENS) {
            float *from[BYTE_TOKENS];
            place(x, row, stop, 0, BYTE_TOKENS, from);
            byte_rows((const float *const *)from, BYTE_TOKENS, K, bytes + (row - first) * step, scales + row - first);
        }
        for (int64_t n = 0; n < out.columns; n += BYTE_PANEL) {
            const float *panel = weight + n / BYTE_PANEL * byte_panel(K);
            int64_t columns = out.columns - n < BYTE_PANEL ? out.columns - n : BYTE_PANEL;
            for (int64_t row = first; row < last; row += BYTE_TOKENS) {
                float *to[BYTE_TOKENS];
                place(out, row, stop, n, BYTE_TOKENS, to);
                byte_product(bytes + (row - first) * step, scales + row - first, panel, bias ? bias + n : 0, K, columns,
                             dots, to);
            }
        }
    }
}
#endif
