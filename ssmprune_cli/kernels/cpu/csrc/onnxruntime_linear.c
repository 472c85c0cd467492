/* A linear layer with a weight in eight bits, in ONNX Runtime. Letters: K inputs, P outputs. */
#include "onnxruntime_kernel.h"
#include "bytes.h"

#define LINEAR_TOKENS 64 /* of a part of a linear layer, about: more read a weight less often, fewer occupy more threads */

typedef struct { Rows x, out; const float *weight; int64_t items; int dots; } Layer;

static void linear_item(void *data, size_t item) {
    Work *work = data;
    const Layer *a = work->arguments;
    int64_t from, to, rows = a->x.L;
    float *room = aligned_alloc(64, (size_t)byte_room(a->x.columns) * sizeof(float));
    if (!room) {
        fail(work, 1);
        return;
    }
    share(work->count, (int64_t)item, a->items, &from, &to);
    from *= BYTE_TOKENS, to *= BYTE_TOKENS;
    eight_bit(a->x, a->weight, 0, a->out, from, to < rows ? to : rows, a->dots, room);
    if (a->dots == TILES_OF_BYTES) tiles_end();
    free(room);
}

/* A weight as products take it; the caller frees it. */
static OrtStatus *packed(const Kernel *k, const Tensor *values, const Tensor *scales, float **weight) {
    int64_t P = values->size[0], K = values->size[1];
    *weight = aligned_alloc(64, (size_t)(byte_size(K, P) + 16) * sizeof(float));
    if (!*weight) return ort_create_status(k->api)(ORT_FAIL, "memory ran out");
    pack_bytes(values->data, scales->data, K, P, *weight);
    return 0;
}

OrtStatus *pack_constants(Kernel *k, const OrtKernelInfo *info) {
    const OrtValue *both[2];
    Tensor values, scales;
    for (size_t i = 0; i < 2; i++) {
        int constant;
        TRY(ort_constant(k->api)(info, 1 + i, &constant, &both[i]));
        if (!constant) return 0;
    }
    TRY(tensor_of(k, both[0], &values, 2, -1, -1, -1));
    TRY(tensor_of(k, both[1], &scales, 1, values.size[0], -1, -1));
    return packed(k, &values, &scales, &k->weight);
}

OrtStatus *linear_int8(const Kernel *k, OrtKernelContext *context) {
    const OrtValue *tokens;
    OrtValue *results;
    Tensor x, values, scales;
    void *y;
    float *own = 0;
    TRY(input(k, context, 1, &values, 2, -1, -1, -1));
    int64_t P = values.size[0], K = values.size[1], rows = 1;
    TRY(input(k, context, 2, &scales, 1, P, -1, -1));
    TRY(ort_input(k->api)(context, 0, &tokens));
    TRY(shape_of(k, tokens, &x));
    if (!x.rank || x.size[x.rank - 1] != K) return fault(k, "the sizes of the inputs do not fit each other");
    for (size_t i = 0; i + 1 < x.rank; i++) rows *= x.size[i];
    TRY(ort_data(k->api)((OrtValue *)tokens, &x.data));
    x.size[x.rank - 1] = P;
    TRY(ort_output(k->api)(context, 0, x.size, x.rank, &results));
    TRY(ort_data(k->api)(results, &y));
    if (!rows) return 0;
    if (!k->weight) TRY(packed(k, &values, &scales, &own));
    Layer a = {{x.data, K, rows, 0, K}, {y, P, rows, 0, P}, own ? own : k->weight, .dots = k->dots,
               .items = (rows + LINEAR_TOKENS - 1) / LINEAR_TOKENS};
    Work work = {&a, (rows + BYTE_TOKENS - 1) / BYTE_TOKENS, 0};
    OrtStatus *status = together(k, context, linear_item, a.items, &work);
    free(own);
    return status;
}
