/* Our ops in ONNX Runtime: the nodes of export/onnx/nodes.py, by the kernels here and in the runtime's threads.
 * Values are float32, and a linear layer's weight may be int8.
 *
 * `onnxruntime.SessionOptions.register_custom_ops_library` calls RegisterCustomOps. Letters: B batch, L tokens, E channels,
 * N state size, K taps, M context tokens; of a linear layer K inputs, P outputs. */
#include "onnxruntime_kernel.h"
#include "bytes.h"
#include "conv.h"
#include "rows.h"
#include "scan.h"

#define PARTS 16 /* of a pass over rows: enough for any number of threads to have about the same */

INLINE void part_of(const Work *work, size_t item, int64_t *from, int64_t *to) {
    share(work->count, (int64_t)item, PARTS, from, to);
}

static void scan_item(void *data, size_t item) {
    Work *work = data;
    const Scan *a = work->arguments;
    int64_t from, to, group = (int64_t)item;
    share((a->channels + W - 1) / W, group % a->groups, a->groups, &from, &to);
    if (from < to) fail(work, scan_forward_group(a, group / a->groups, from, to));
}

static OrtStatus *scan(const Kernel *k, OrtKernelContext *context) {
    Tensor u, delta, A, b, c, bias, D = {0}, gap = {0}, gap_delta = {0};
    size_t next = 6;
    void *y;
    TRY(input(k, context, 0, &u, 3, -1, -1, -1));
    int64_t B = u.size[0], L = u.size[1], E = u.size[2];
    TRY(input(k, context, 1, &delta, 3, B, L, E));
    TRY(input(k, context, 2, &A, 2, E, -1, -1));
    int64_t N = A.size[1];
    if (N > MAX_INNER) return fault(k, "there are more states than a scan has room for");
    TRY(input(k, context, 3, &b, 3, B, L, N));
    TRY(input(k, context, 4, &c, 3, B, L, N));
    TRY(input(k, context, 5, &bias, 1, E, -1, -1));
    if (k->op->has_D) TRY(input(k, context, next++, &D, 1, E, -1, -1));
    if (k->op->gap) TRY(input(k, context, next++, &gap, 2, B, L, -1));
    if (k->op->gap == 2) TRY(input(k, context, next++, &gap_delta, 1, E, -1, -1));
    TRY(output(k, context, 0, B, L, E, &y));
    Scan a = {.u = u.data, .delta = delta.data, .A = A.data, .B = b.data, .C = c.data, .bias = bias.data, .D = D.data,
              .gap = gap.data, .gap_delta = gap_delta.data, .y = y, .batch = B, .length = L, .channels = E, .state = N,
              .u_b = L * E, .u_l = E, .delta_b = L * E, .delta_l = E, .B_b = L * N, .B_l = N, .C_b = L * N, .C_l = N,
              .gap_b = L, .gap_l = 1, .A_c = N, .A_n = 1, .softplus = 1, .reverse = k->op->reverse, .outputs = L,
              .groups = B < 4 ? 4 : 1, .scale = 1};
    Work work = {&a, 0, 0};
    return together(k, context, scan_item, B * a.groups, &work);
}

/* The weight (E, taps) of a convolution as kernels read it, (taps, E); the caller frees it. */
static float *taps_of(const float *weight, int64_t E, int64_t taps) {
    float *turned = malloc((size_t)(E * taps) * sizeof(float) + 1);
    for (int64_t c = 0; turned && c < E; c++)
        for (int64_t tap = 0; tap < taps; tap++) turned[tap * E + c] = weight[c * taps + tap];
    return turned;
}

static void conv_item(void *data, size_t item) {
    Work *work = data;
    int64_t from, to;
    part_of(work, item, &from, &to);
    conv_rows(work->arguments, from, to);
}

static void sparse_item(void *data, size_t item) {
    Work *work = data;
    int64_t from, to;
    part_of(work, item, &from, &to);
    fail(work, sparse_conv_rows(work->arguments, from, to));
}

static void grid_item(void *data, size_t item) {
    Work *work = data;
    fail(work, grid_conv_item(work->arguments, (int64_t)item));
}

/* The convolution `a`, which lacks its taps, in `items` parts. */
static OrtStatus *convolved(const Kernel *k, OrtKernelContext *context, Conv *a, const float *weight, int64_t taps,
                            void (*body)(void *, size_t), int64_t items) {
    float *turned = taps_of(weight, a->channels, taps);
    Work work = {a, a->batch * a->length, 0};
    if (!turned) return ort_create_status(k->api)(ORT_FAIL, "memory ran out");
    a->taps = turned;
    OrtStatus *status = together(k, context, body, items, &work);
    free(turned);
    return status;
}

static OrtStatus *conv(const Kernel *k, OrtKernelContext *context) {
    Tensor x, weight, bias;
    void *y;
    TRY(input(k, context, 0, &x, 3, -1, -1, -1));
    int64_t B = x.size[0], L = x.size[1], E = x.size[2];
    TRY(input(k, context, 1, &weight, 2, E, -1, -1));
    TRY(input(k, context, 2, &bias, 1, E, -1, -1));
    TRY(output(k, context, 0, B, L, E, &y));
    Conv a = {.x = x.data, .y = y, .bias = bias.data, .batch = B, .length = L, .channels = E, .width = weight.size[1],
              .x_b = L * E, .x_l = E, .reverse = k->op->reverse};
    return convolved(k, context, &a, weight.data, a.width, conv_item, PARTS);
}

static OrtStatus *sparse_conv(const Kernel *k, OrtKernelContext *context) {
    Tensor x, others, sources, weight, bias;
    void *y;
    TRY(input(k, context, 0, &x, 3, -1, -1, -1));
    int64_t B = x.size[0], L = x.size[1], E = x.size[2];
    TRY(input(k, context, 1, &others, 3, B, -1, E));
    TRY(input(k, context, 3, &weight, 2, E, -1, -1));
    TRY(input(k, context, 2, &sources, 3, B, L, weight.size[1]));
    TRY(input(k, context, 4, &bias, 1, E, -1, -1));
    TRY(output(k, context, 0, B, L, E, &y));
    Conv a = {.x = x.data, .context = others.data, .y = y, .bias = bias.data, .positions = sources.data, .batch = B,
              .length = L, .channels = E, .width = weight.size[1], .x_b = L * E, .x_l = E, .others = others.size[1],
              .context_b = others.size[1] * E, .context_l = E};
    return convolved(k, context, &a, weight.data, a.width, sparse_item, PARTS);
}

static OrtStatus *grid_conv(const Kernel *k, OrtKernelContext *context) {
    Tensor x, weight, bias, positions = {0};
    void *y;
    TRY(input(k, context, 0, &x, 3, -1, -1, -1));
    int64_t B = x.size[0], L = x.size[1], E = x.size[2];
    TRY(input(k, context, 1, &weight, 3, E, -1, -1));
    int64_t K = weight.size[1];
    TRY(input(k, context, 2, &bias, 1, E, -1, -1));
    if (k->op->whole) TRY(input(k, context, 3, &positions, 2, B, L, -1));
    else if (L != k->grid[0] * k->grid[1]) return fault(k, "the tokens do not fill the grid");
    if (weight.size[2] != K || k->outputs < 0 || k->outputs > L)
        return fault(k, "the sizes of the inputs do not fit each other");
    TRY(output(k, context, 0, B, k->outputs, E, &y));
    Conv a = {.x = x.data, .y = y, .bias = bias.data, .positions = positions.data, .batch = B, .length = L, .channels = E,
              .width = K, .x_b = L * E, .x_l = E, .rows = k->grid[0], .columns = k->grid[1], .outputs = k->outputs};
    return convolved(k, context, &a, weight.data, K * K, grid_item, B * ((E + SLAB - 1) / SLAB));
}

static void norm_item(void *data, size_t item) {
    Work *work = data;
    int64_t from, to;
    part_of(work, item, &from, &to);
    for (int64_t row = from; row < to; row++) norm_row(work->arguments, row, 0, 0);
}

static OrtStatus *norm(const Kernel *k, OrtKernelContext *context) {
    Tensor hidden, residual = {0}, weight;
    void *normed, *stream;
    int has_residual = k->op->inputs == 3;
    TRY(input(k, context, 0, &hidden, 3, -1, -1, -1));
    int64_t B = hidden.size[0], L = hidden.size[1], E = hidden.size[2];
    if (has_residual) TRY(input(k, context, 1, &residual, 3, B, L, E));
    TRY(input(k, context, 1 + (size_t)has_residual, &weight, 1, E, -1, -1));
    TRY(output(k, context, 0, B, L, E, &normed));
    TRY(output(k, context, 1, B, L, E, &stream));
    Norm a = {.hidden = hidden.data, .residual = residual.data, .weight = weight.data, .stream = stream, .normed = normed,
              .rows = B * L, .channels = E, .eps = k->value};
    Work work = {&a, B * L, 0};
    return together(k, context, norm_item, PARTS, &work);
}

static void gate_item(void *data, size_t item) {
    Work *work = data;
    int64_t from, to;
    part_of(work, item, &from, &to);
    gate_rows(work->arguments, from, to);
}

static OrtStatus *gate(const Kernel *k, OrtKernelContext *context) {
    Tensor z, term;
    size_t count = (size_t)k->op->count;
    TRY(input(k, context, count, &z, 3, -1, -1, -1));
    int64_t B = z.size[0], L = z.size[1], E = z.size[2];
    Gate a = {.z = z.data, .batch = B, .length = L, .channels = E, .count = k->op->count, .z_b = L * E, .z_l = E,
              .scale = k->value};
    for (size_t i = 0; i < count; i++) {
        TRY(input(k, context, i, &term, 3, B, L, E));
        a.y[i] = term.data;
    }
    TRY(output(k, context, 0, B, L, E, &a.out));
    Work work = {&a, B * L, 0};
    return together(k, context, gate_item, PARTS, &work);
}

static OrtStatus *create(const OrtCustomOp *op, OrtApi api, const OrtKernelInfo *info, void **made) {
    Kernel *k = calloc(1, sizeof *k);
    if (!k) return ort_create_status(api)(ORT_FAIL, "memory ran out");
    k->api = api, k->op = (const Op *)op;
    size_t two = 2, one = 1;
    OrtStatus *status = 0;
    if (k->op->compute == grid_conv) {
        status = ort_integers(api)(info, "grid", k->grid, &two);
        if (!status) status = ort_integers(api)(info, "outputs", &k->outputs, &one);
        if (!status && (k->grid[0] < 0 || k->grid[1] < 0)) status = fault(k, "a grid has sizes below 0");
    } else if (k->op->compute == norm) {
        status = ort_float(api)(info, "eps", &k->value);
    } else if (k->op->compute == gate) {
        status = ort_float(api)(info, "scale", &k->value);
    } else if (k->op->compute == linear_int8) {
        k->dots = best_dots(TILES_OF_BYTES);
        status = pack_constants(k, info);
    }
    if (status) free(k);
    else *made = k;
    return status;
}

static void destroy(void *kernel) {
    free(((Kernel *)kernel)->weight);
    free(kernel);
}

static OrtStatus *compute(void *kernel, OrtKernelContext *context) {
    const Kernel *k = kernel;
    return k->op->compute(k, context);
}

static const char *name(const OrtCustomOp *op) { return ((const Op *)op)->name; }
static const char *provider(const OrtCustomOp *op) { return (void)op, "CPUExecutionProvider"; }
static size_t inputs(const OrtCustomOp *op) { return ((const Op *)op)->inputs; }
static size_t outputs(const OrtCustomOp *op) { return ((const Op *)op)->outputs; }
static int input_type(const OrtCustomOp *op, size_t i) {
    const Op *own = (const Op *)op;
    return own->whole >> i & 1 ? ORT_INT64 : own->bytes >> i & 1 ? ORT_INT8 : ORT_FLOAT;
}
static int output_type(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, ORT_FLOAT; }
static int zero_of(const OrtCustomOp *op, size_t i) { return (void)op, (void)i, 0; }
static int zero(const OrtCustomOp *op) { return (void)op, 0; }
static int first_version(const OrtCustomOp *op) { return (void)op, 1; }
static int last_version(const OrtCustomOp *op) { return (void)op, INT32_MAX; }

#define INTERFACE                                                                                                        \
    {.version = ORT_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,         \
     .GetInputTypeCount = inputs, .GetOutputType = output_type, .GetOutputTypeCount = outputs, .KernelDestroy = destroy, \
     .GetInputCharacteristic = zero_of, .GetOutputCharacteristic = zero_of, .GetInputMemoryType = zero_of,               \
     .GetVariadicInputMinArity = zero, .GetVariadicInputHomogeneity = zero, .GetVariadicOutputMinArity = zero,           \
     .GetVariadicOutputHomogeneity = zero, .CreateKernelV2 = create, .KernelComputeV2 = compute,                         \
     .GetStartVersion = first_version, .GetEndVersion = last_version}
#define OP(name, in, out, ...) {INTERFACE, name, in, out, __VA_ARGS__}
#define SCANS(suffix, in, kind)                                                                               \
    OP("SelectiveScan" suffix, 7 + in, 1, .has_D = 1, .gap = kind, .compute = scan),                          \
    OP("SelectiveScan" suffix "Reverse", 7 + in, 1, .has_D = 1, .gap = kind, .reverse = 1, .compute = scan),  \
    OP("SelectiveScanNoSkip" suffix, 6 + in, 1, .gap = kind, .compute = scan),                                \
    OP("SelectiveScanNoSkip" suffix "Reverse", 6 + in, 1, .gap = kind, .reverse = 1, .compute = scan)
#define SUM(terms) OP("GatedSum" #terms, terms + 1, 1, .count = terms, .compute = gate)

static const Op OPS[] = {
    SCANS("", 0, 0),
    SCANS("GapOwn", 1, 1),
    SCANS("GapGiven", 2, 2),
    OP("CausalConv1d", 3, 1, .compute = conv),
    OP("CausalConv1dReverse", 3, 1, .reverse = 1, .compute = conv),
    OP("SparseConv1d", 5, 1, .whole = 1 << 2, .compute = sparse_conv),
    OP("GridConv2d", 3, 1, .compute = grid_conv),
    OP("GridConv2dPlaced", 4, 1, .whole = 1 << 3, .compute = grid_conv),
    OP("RmsNorm", 2, 2, .compute = norm),
    OP("AddRmsNorm", 3, 2, .compute = norm),
    OP("LinearInt8", 3, 1, .bytes = 1 << 1, .compute = linear_int8),
    SUM(1), SUM(2), SUM(3), SUM(4),
};

/* Called by the runtime. The domain has to live as long as any session with these options, and nobody says when that ends:
 * it is left to the process. */
OrtStatus *RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    OrtApi api = base->GetApi(ORT_VERSION);
    OrtCustomOpDomain *domain;
    if (!api) return ort_create_status(base->GetApi(1))(ORT_FAIL, "the kernels of ssmprune need ONNX Runtime 1.17 or later");
    TRY(ort_create_domain(api)("ssmprune", &domain));
    for (size_t i = 0; i < sizeof OPS / sizeof *OPS; i++) TRY(ort_add_op(api)(domain, &OPS[i].interface));
    return ort_add_domain(api)(options, domain);
}
