/* What kernels for ONNX Runtime share: their data, their inputs and outputs, and the runtime's threads. */
#ifndef SSMPRUNE_ONNXRUNTIME_KERNEL_H
#define SSMPRUNE_ONNXRUNTIME_KERNEL_H
#include "onnxruntime.h"
#include "threads.h"

#define TRY(call)                   \
    do {                            \
        OrtStatus *status = (call); \
        if (status) return status;  \
    } while (0)

typedef struct { void *data; int64_t size[4]; size_t rank; } Tensor;

struct Kernel;
typedef struct {
    OrtCustomOp interface; /* first, so that a pointer to it is one to this */
    const char *name;
    size_t inputs, outputs;
    int whole, bytes; /* bits of the inputs that are int64, and int8 */
    int has_D, gap, reverse, count; /* of a scan: see nodes.py, `gap` is 1 for Own, 2 for Given; of a sum: terms */
    OrtStatus *(*compute)(const struct Kernel *k, OrtKernelContext *context);
} Op;

typedef struct Kernel {
    OrtApi api;
    const Op *op;
    int64_t grid[2], outputs;
    float value;   /* eps or scale */
    float *weight; /* of a linear layer, packed: if it is the same in every run */
    int dots;      /* how its products of bytes are made: as well as the processor can, for the sums are the same */
} Kernel;

/* A linear layer by products of bytes, and its weight if that is the same in every run: onnxruntime_linear.c. */
OrtStatus *linear_int8(const Kernel *k, OrtKernelContext *context);
OrtStatus *pack_constants(Kernel *k, const OrtKernelInfo *info);

INLINE OrtStatus *fault(const Kernel *k, const char *message) {
    return ort_create_status(k->api)(ORT_INVALID_ARGUMENT, message);
}

INLINE OrtStatus *shape_of(const Kernel *k, const OrtValue *value, Tensor *out) {
    OrtTensorTypeAndShapeInfo *info;
    TRY(ort_type_and_shape(k->api)(value, &info));
    OrtStatus *status = ort_rank(k->api)(info, &out->rank);
    if (!status && out->rank > 4) status = fault(k, "a tensor has more than four dimensions");
    if (!status) status = ort_dimensions(k->api)(info, out->size, out->rank);
    ort_release_type_and_shape(k->api)(info);
    return status;
}

/* A tensor that must have `rank` sizes; of those that are not -1 these. Kernels read what sizes say. */
INLINE OrtStatus *tensor_of(const Kernel *k, const OrtValue *value, Tensor *out, size_t rank, int64_t s0, int64_t s1,
                            int64_t s2) {
    int64_t wanted[3] = {s0, s1, s2};
    TRY(shape_of(k, value, out));
    if (out->rank != rank) return fault(k, "an input has another number of dimensions than its op takes");
    for (size_t i = 0; i < rank; i++)
        if (wanted[i] >= 0 && out->size[i] != wanted[i]) return fault(k, "the sizes of the inputs do not fit each other");
    return ort_data(k->api)((OrtValue *)value, &out->data);
}

/* The same of input `index`. */
INLINE OrtStatus *input(const Kernel *k, OrtKernelContext *context, size_t index, Tensor *out, size_t rank, int64_t s0,
                        int64_t s1, int64_t s2) {
    const OrtValue *value;
    TRY(ort_input(k->api)(context, index, &value));
    return tensor_of(k, value, out, rank, s0, s1, s2);
}

INLINE OrtStatus *output(const Kernel *k, OrtKernelContext *context, size_t index, int64_t B, int64_t L, int64_t E,
                         void **data) {
    OrtValue *value;
    int64_t sizes[3] = {B, L, E};
    TRY(ort_output(k->api)(context, index, sizes, 3, &value));
    return ort_data(k->api)(value, data);
}

/* What the threads do together. */
typedef struct { const void *arguments; int64_t count, failed; } Work;

INLINE void fail(Work *work, int64_t failed) {
    if (failed) __atomic_fetch_or(&work->failed, failed, __ATOMIC_RELAXED);
}

INLINE OrtStatus *together(const Kernel *k, OrtKernelContext *context, void (*body)(void *, size_t), int64_t items,
                           Work *work) {
    TRY(ort_parallel(k->api)(context, body, (size_t)items, 0, work));
    if (work->failed & 1) return ort_create_status(k->api)(ORT_FAIL, "memory ran out");
    return work->failed ? fault(k, "a source or a position lies outside the tokens") : 0;
}
#endif
