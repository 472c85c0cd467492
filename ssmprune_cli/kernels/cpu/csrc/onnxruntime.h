/* The part of ONNX Runtime's C interface that kernels of our own need, as version 17 (ONNX Runtime 1.17) defines it.
 *
 * It is stable: functions and fields have their places for good, and later versions only add to the end. So the few that
 * are used are declared here, and nothing of ONNX Runtime is needed to compile. Letters: see its onnxruntime_c_api.h. */
#ifndef SSMPRUNE_ONNXRUNTIME_H
#define SSMPRUNE_ONNXRUNTIME_H
#include <stddef.h>
#include <stdint.h>

#define ORT_VERSION 17 /* the first with KernelContext_ParallelFor */

typedef struct OrtStatus OrtStatus; /* 0 is success */
typedef struct OrtValue OrtValue;
typedef struct OrtKernelInfo OrtKernelInfo;
typedef struct OrtKernelContext OrtKernelContext;
typedef struct OrtSessionOptions OrtSessionOptions;
typedef struct OrtCustomOpDomain OrtCustomOpDomain;
typedef struct OrtTensorTypeAndShapeInfo OrtTensorTypeAndShapeInfo;
typedef void (*OrtFunction)(void);
typedef const OrtFunction *OrtApi; /* a table of functions */

typedef struct {
    OrtApi (*GetApi)(uint32_t version); /* 0 for one that this runtime does not have */
    const char *(*GetVersionString)(void);
} OrtApiBase;

enum { ORT_FAIL = 1, ORT_INVALID_ARGUMENT = 2 };     /* codes of a status */
enum { ORT_FLOAT = 1, ORT_INT8 = 3, ORT_INT64 = 7 }; /* types of elements */

/* Places in the table, and their functions. */
#define ORT(api, place, ...) ((OrtStatus * (*)(__VA_ARGS__))(api)[place])
#define ort_create_status(api) ORT(api, 0, int code, const char *message)
#define ort_create_domain(api) ORT(api, 26, const char *name, OrtCustomOpDomain **out)
#define ort_add_op(api) ORT(api, 27, OrtCustomOpDomain *domain, const struct OrtCustomOp *op)
#define ort_add_domain(api) ORT(api, 28, OrtSessionOptions *options, OrtCustomOpDomain *domain)
#define ort_data(api) ORT(api, 51, OrtValue *value, void **out)
#define ort_rank(api) ORT(api, 61, const OrtTensorTypeAndShapeInfo *info, size_t *out)
#define ort_dimensions(api) ORT(api, 62, const OrtTensorTypeAndShapeInfo *info, int64_t *out, size_t count)
#define ort_type_and_shape(api) ORT(api, 65, const OrtValue *value, OrtTensorTypeAndShapeInfo **out)
#define ort_float(api) ORT(api, 85, const OrtKernelInfo *info, const char *name, float *out)
#define ort_input(api) ORT(api, 90, const OrtKernelContext *context, size_t index, const OrtValue **out)
#define ort_output(api) \
    ORT(api, 91, OrtKernelContext *context, size_t index, const int64_t *sizes, size_t rank, OrtValue **out)
#define ort_release_type_and_shape(api) ((void (*)(OrtTensorTypeAndShapeInfo * info))(api)[99])
#define ort_integers(api) ORT(api, 163, const OrtKernelInfo *info, const char *name, int64_t *out, size_t *count)
/* An input as a session holds it, if it is the same in every run. */
#define ort_constant(api) ORT(api, 249, const OrtKernelInfo *info, size_t index, int *is_constant, const OrtValue **out)
/* Calls body(data, 0 ... count - 1) in the runtime's own threads; `batches` 0 leaves it to the runtime how many at once. */
#define ort_parallel(api) \
    ORT(api, 274, const OrtKernelContext *context, void (*body)(void *data, size_t item), size_t count, size_t batches, \
        void *data)

/* What a runtime asks of an op. Of two that do the same the later one is asked, if it is there. */
typedef struct OrtCustomOp {
    uint32_t version; /* ORT_VERSION: no later field is read */
    void *(*CreateKernel)(const struct OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info);
    const char *(*GetName)(const struct OrtCustomOp *op);
    const char *(*GetExecutionProviderType)(const struct OrtCustomOp *op);
    int (*GetInputType)(const struct OrtCustomOp *op, size_t index);
    size_t (*GetInputTypeCount)(const struct OrtCustomOp *op);
    int (*GetOutputType)(const struct OrtCustomOp *op, size_t index);
    size_t (*GetOutputTypeCount)(const struct OrtCustomOp *op);
    void (*KernelCompute)(void *kernel, OrtKernelContext *context);
    void (*KernelDestroy)(void *kernel);
    int (*GetInputCharacteristic)(const struct OrtCustomOp *op, size_t index); /* 0: it has to be there */
    int (*GetOutputCharacteristic)(const struct OrtCustomOp *op, size_t index);
    int (*GetInputMemoryType)(const struct OrtCustomOp *op, size_t index); /* 0: where the kernel runs */
    int (*GetVariadicInputMinArity)(const struct OrtCustomOp *op);
    int (*GetVariadicInputHomogeneity)(const struct OrtCustomOp *op);
    int (*GetVariadicOutputMinArity)(const struct OrtCustomOp *op);
    int (*GetVariadicOutputHomogeneity)(const struct OrtCustomOp *op);
    OrtStatus *(*CreateKernelV2)(const struct OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **kernel);
    OrtStatus *(*KernelComputeV2)(void *kernel, OrtKernelContext *context);
    OrtStatus *(*InferOutputShapeFn)(const struct OrtCustomOp *op, void *context);
    int (*GetStartVersion)(const struct OrtCustomOp *op); /* of the op in its domain */
    int (*GetEndVersion)(const struct OrtCustomOp *op);
} OrtCustomOp;
#endif
