/* A linear layer: out = x . weight + bias. */
#include "bytes.h"

/* x (rows, K), whose rows are x_l apart; out (rows, P); weight (K, P) in tiles or, with `eight_bits`, in bytes; bias (P) or none. */
ARGUMENTS(Linear,
    const float *x, *weight, *bias;
    float *out;
    int64_t rows, inputs, outputs, x_l, parts, eight_bits, dots, threads;
);
DESCRIBE(Linear)

/* Returns 0, or 1 when memory ran out. */
int linear(const Linear *a) {
    int64_t threads = team(a->threads), room = a->eight_bits ? byte_room(a->inputs) : tiled_room(a->inputs, a->parts);
    float *scratch = aligned_alloc(64, (size_t)(threads * room + 16) * sizeof(float));
    if (!scratch) return 1;
#pragma omp parallel num_threads(threads)
    {
        int64_t start, stop;
        own_share(a->rows, &start, &stop);
        Rows x = {(float *)a->x, a->inputs, a->rows, 0, a->x_l}, out = {a->out, a->outputs, a->rows, 0, a->outputs};
        float *own = scratch + omp_get_thread_num() * room;
        if (a->eight_bits) {
            eight_bit(x, a->weight, a->bias, out, start, stop, (int)a->dots, own);
            if (a->dots == TILES_OF_BYTES) tiles_end();
        } else {
            tiled(x, a->weight, a->bias, out, start, stop, a->parts, (uint16_t *)own);
            tiles_end();
        }
    }
    free(scratch);
    return 0;
}
