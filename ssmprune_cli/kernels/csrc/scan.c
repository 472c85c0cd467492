/* The aligned selective scan and the causal depthwise convolution with SiLU, forward and backward, float32.
 *
 * Layout is channels-last. A vector holds W neighbouring channels of one token; the N states of those channels stay in
 * registers or L1 for the whole sequence, so nothing of size B*L*E*N is ever stored. The backward pass keeps the states
 * at every CHUNK-th token and recomputes those between. Glossary: as in op.py.
 *
 * Portable GCC/Clang vector extensions; the caller compiles this file for the instruction set that it runs on.
 * Do not compile with -ffast-math: rounding by adding MAGIC would be optimised away.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef W /* lanes of a vector: given by the tests, which run every width on any processor */
#elif defined(__AVX512F__)
#define W 16
#elif defined(__AVX2__)
#define W 8
#else
#define W 4
#endif
#define CHUNK 16
#define MAX_INNER 64 /* states or taps; the caller checks */
#define INLINE static inline __attribute__((always_inline))

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));

typedef struct {
    const float *u, *delta, *A, *B, *C, *D, *z, *bias, *shift, *gap, *gap_delta, *grad;
    float *y, *du, *ddelta, *dA, *dB, *dC, *dD, *dz, *dbias, *dshift, *dgap_delta;
    int64_t batch, length, channels, state;
    /* strides in floats: batch and row of each (B, L, .) input; the last dimension is dense */
    int64_t u_b, u_l, delta_b, delta_l, B_b, B_l, C_b, C_l, z_b, z_l, shift_b, shift_l, gap_b, gap_l;
    int64_t softplus, reverse, threads, groups;
} Scan;

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }

INLINE vf load(const float *p, int lanes) {
    vf v = {0};
    if (lanes == W) memcpy(&v, p, sizeof v);
    else memcpy(&v, p, (size_t)lanes * 4);
    return v;
}

INLINE void store(float *p, vf v, int lanes) {
    if (lanes == W) memcpy(p, &v, sizeof v);
    else memcpy(p, &v, (size_t)lanes * 4);
}

INLINE float sum_lanes(vf v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

/* 2^x: nearest integer by MAGIC, a minimax polynomial of degree 5 on the rest (relative error 1.7e-7), exponent bits. */
INLINE vf exp2_(vf x) {
    const float MAGIC = 12582912.0f; /* 1.5 * 2^23 */
    x = pick(x < -126.0f, splat(-126.0f), x);
    x = pick(x > 126.0f, splat(126.0f), x);
    vf shifted = x + MAGIC, r = x - (shifted - MAGIC);
    vf p = 0.0013264727f * r + 0.009671513f;
    p = p * r + 0.055507336f;
    p = p * r + 0.24022243f;
    p = p * r + 0.693147f;
    p = p * r + 1.0f;
    return (vf)((vi)p + (((vi)shifted - 0x4B400000) << 23));
}

INLINE vf exp_(vf x) { return exp2_(x * 1.44269504f); }
INLINE vf sigmoid_(vf x) { return 1.0f / (1.0f + exp_(-x)); }

/* max(x, 0) + log1p(exp(-|x|)); the logarithm by its atanh series, without cancellation for small exp(-|x|). */
INLINE vf softplus_(vf x) {
    vf w = exp_(pick(x > 0.0f, -x, x));
    vi big = w > 0.41421356f;
    vf f = pick(big, (w - 1.0f) * 0.5f, w), s = f / (2.0f + f), q = s * s;
    vf series = 2.0f * s * (1.0f + q * (0.33333333f + q * (0.2f + q * (0.14285714f + q * 0.11111111f))));
    return pick(x > 0.0f, x, (vf){0}) + series + pick(big, splat(0.69314718f), (vf){0});
}

/* One token of one block of channels: its raw step, step size, decay time and input. */
typedef struct { vf raw, step, decay, u; } Token;

INLINE Token read_token(const Scan *a, int64_t b, int64_t t, int64_t c, int lanes, vf bias, vf gap_delta) {
    Token k;
    k.raw = load(a->delta + b * a->delta_b + t * a->delta_l + c, lanes) + bias;
    k.step = a->softplus ? softplus_(k.raw) : k.raw;
    k.decay = k.step;
    if (a->shift) k.decay += load(a->shift + b * a->shift_b + t * a->shift_l + c, lanes);
    if (a->gap) k.decay += a->gap[b * a->gap_b + t * a->gap_l] * (a->gap_delta ? gap_delta : k.step);
    k.u = load(a->u + b * a->u_b + t * a->u_l + c, lanes);
    return k;
}

INLINE void load_A(const Scan *a, int64_t c, int lanes, int N, vf *A) {
    for (int n = 0; n < N; n++)
        for (int i = 0; i < W; i++) A[n][i] = i < lanes ? a->A[(c + i) * N + n] : 0;
}

INLINE void forward_block(const Scan *a, int64_t b, int64_t c, int lanes, int N) {
    vf A[MAX_INNER], h[MAX_INNER];
    load_A(a, c, lanes, N, A);
    for (int n = 0; n < N; n++) A[n] *= 1.44269504f, h[n] = (vf){0};
    vf bias = a->bias ? load(a->bias + c, lanes) : (vf){0}, D = a->D ? load(a->D + c, lanes) : (vf){0};
    vf gap_delta = a->gap_delta ? load(a->gap_delta + c, lanes) : (vf){0};
    for (int64_t i = 0; i < a->length; i++) {
        int64_t t = a->reverse ? a->length - 1 - i : i;
        Token k = read_token(a, b, t, c, lanes, bias, gap_delta);
        const float *B = a->B + b * a->B_b + t * a->B_l, *C = a->C + b * a->C_b + t * a->C_l;
        vf drive = k.step * k.u, even = D * k.u, odd = {0};
        for (int n = 0; n < N; n++) {
            h[n] = exp2_(k.decay * A[n]) * h[n] + drive * B[n];
            if (n & 1) odd += h[n] * C[n];
            else even += h[n] * C[n];
        }
        vf y = even + odd;
        if (a->z) {
            vf z = load(a->z + b * a->z_b + t * a->z_l + c, lanes);
            y *= z * sigmoid_(z);
        }
        store(a->y + (b * a->length + t) * a->channels + c, y, lanes);
    }
}

void scan_forward(const Scan *a) {
    int64_t blocks = (a->channels + W - 1) / W;
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t item = 0; item < a->batch * blocks; item++) {
        int64_t b = item / blocks, c = item % blocks * W;
        int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
        if (a->state == 16) forward_block(a, b, c, lanes, 16);
        else forward_block(a, b, c, lanes, (int)a->state);
    }
}

/* dB and dC of one token add up over the blocks of channels: `sums` holds them lane by lane, 2 * N vectors a token. */
INLINE void backward_block(const Scan *a, int64_t b, int64_t c, int lanes, int N, vf *borders, vf *sums) {
    vf A[MAX_INNER], dA[MAX_INNER], carry[MAX_INNER], h[MAX_INNER];
    vf states[CHUNK + 1][MAX_INNER], decays[CHUNK][MAX_INNER];
    Token tokens[CHUNK];
    const float log2e = 1.44269504f;
    load_A(a, c, lanes, N, A);
    for (int n = 0; n < N; n++) dA[n] = carry[n] = h[n] = (vf){0};
    vf bias = a->bias ? load(a->bias + c, lanes) : (vf){0}, D = a->D ? load(a->D + c, lanes) : (vf){0};
    vf gap_delta = a->gap_delta ? load(a->gap_delta + c, lanes) : (vf){0};
    vf dD = {0}, dbias = {0}, dgap_delta = {0};
    int64_t L = a->length, chunks = (L + CHUNK - 1) / CHUNK;
    for (int64_t i = 0; i < L; i++) {
        if (i % CHUNK == 0)
            for (int n = 0; n < N; n++) borders[i / CHUNK * N + n] = h[n];
        int64_t t = a->reverse ? L - 1 - i : i;
        Token k = read_token(a, b, t, c, lanes, bias, gap_delta);
        const float *B = a->B + b * a->B_b + t * a->B_l;
        vf drive = k.step * k.u, decay = k.decay * log2e;
        for (int n = 0; n < N; n++) h[n] = exp2_(decay * A[n]) * h[n] + drive * B[n];
    }
    for (int64_t chunk = chunks - 1; chunk >= 0; chunk--) {
        int64_t start = chunk * CHUNK;
        int size = L - start < CHUNK ? (int)(L - start) : CHUNK;
        for (int n = 0; n < N; n++) states[0][n] = borders[chunk * N + n];
        for (int j = 0; j < size; j++) {
            int64_t t = a->reverse ? L - 1 - start - j : start + j;
            Token k = tokens[j] = read_token(a, b, t, c, lanes, bias, gap_delta);
            const float *B = a->B + b * a->B_b + t * a->B_l;
            vf drive = k.step * k.u, decay = k.decay * log2e;
            for (int n = 0; n < N; n++) {
                decays[j][n] = exp2_(decay * A[n]);
                states[j + 1][n] = decays[j][n] * states[j][n] + drive * B[n];
            }
        }
        for (int j = size - 1; j >= 0; j--) {
            int64_t t = a->reverse ? L - 1 - start - j : start + j, at = (b * L + t) * a->channels + c;
            Token k = tokens[j];
            const float *B = a->B + b * a->B_b + t * a->B_l, *C = a->C + b * a->C_b + t * a->C_l;
            vf grad = load(a->grad + at, lanes);
            if (a->z) {
                vf z = load(a->z + b * a->z_b + t * a->z_l + c, lanes), gate = sigmoid_(z), y = D * k.u;
                for (int n = 0; n < N; n++) y += states[j + 1][n] * C[n];
                store(a->dz + at, grad * y * gate * (1.0f + z * (1.0f - gate)), lanes);
                grad *= z * gate;
            }
            vf drive = k.step * k.u, ddrive = {0}, ddecay = {0}, *sum = sums + t * 2 * N;
            for (int n = 0; n < N; n++) {
                vf dh = carry[n] + grad * C[n];
                sum[n] += dh * drive;
                sum[N + n] += grad * states[j + 1][n];
                ddrive += dh * B[n];
                carry[n] = dh * decays[j][n];
                vf dexponent = carry[n] * states[j][n];
                ddecay += dexponent * A[n];
                dA[n] += dexponent * k.decay;
            }
            dD += grad * k.u;
            store(a->du + at, ddrive * k.step + D * grad, lanes);
            vf dstep = ddrive * k.u + ddecay;
            if (a->shift) store(a->dshift + at, ddecay, lanes);
            if (a->gap) {
                vf gap = splat(a->gap[b * a->gap_b + t * a->gap_l]);
                if (a->gap_delta) dgap_delta += ddecay * gap;
                else dstep += ddecay * gap;
            }
            if (a->softplus) dstep *= sigmoid_(k.raw);
            dbias += dstep;
            store(a->ddelta + at, dstep, lanes);
        }
    }
    for (int n = 0; n < N; n++)
        for (int i = 0; i < lanes; i++) a->dA[(b * a->channels + c + i) * N + n] = dA[n][i];
    store(a->dD + b * a->channels + c, dD, lanes);
    store(a->dbias + b * a->channels + c, dbias, lanes);
    store(a->dgap_delta + b * a->channels + c, dgap_delta, lanes);
}

/* Every (sample, group of channel blocks) writes sums of its own; the caller adds them up, in an order that is fixed.
 * Returns 0, or 1 when memory ran out. */
int scan_backward(const Scan *a) {
    int64_t blocks = (a->channels + W - 1) / W, L = a->length, N = a->state;
    size_t border_bytes = (size_t)((L + CHUNK - 1) / CHUNK * N) * sizeof(vf), sum_bytes = (size_t)(L * 2 * N) * sizeof(vf);
    int failed = 0;
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t item = 0; item < a->batch * a->groups; item++) {
        int64_t b = item / a->groups, group = item % a->groups;
        vf *borders = aligned_alloc(sizeof(vf), border_bytes), *sums = aligned_alloc(sizeof(vf), sum_bytes);
        if (!borders || !sums) {
            failed = 1;
        } else {
            memset(sums, 0, sum_bytes);
            for (int64_t block = blocks * group / a->groups; block < blocks * (group + 1) / a->groups; block++) {
                int64_t c = block * W;
                int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
                if (N == 16) backward_block(a, b, c, lanes, 16, borders, sums);
                else backward_block(a, b, c, lanes, (int)N, borders, sums);
            }
            for (int64_t t = 0; t < L; t++)
                for (int64_t n = 0; n < N; n++) {
                    a->dB[(item * L + t) * N + n] = sum_lanes(sums[t * 2 * N + n]);
                    a->dC[(item * L + t) * N + n] = sum_lanes(sums[t * 2 * N + N + n]);
                }
        }
        free(borders);
        free(sums);
    }
    return failed;
}

typedef struct {
    const float *x, *weight, *bias, *grad;
    float *y, *dx, *dweight, *dbias;
    int64_t batch, length, channels, width, x_b, x_l, reverse, threads;
} Conv;

INLINE void load_taps(const Conv *a, int64_t c, int lanes, vf *taps) {
    for (int64_t k = 0; k < a->width; k++)
        for (int i = 0; i < W; i++) taps[k][i] = i < lanes ? a->weight[(c + i) * a->width + k] : 0;
}

/* The token that tap k of the output at t meets. */
INLINE int64_t source(const Conv *a, int64_t t, int64_t k) {
    return a->reverse ? t + a->width - 1 - k : t - a->width + 1 + k;
}

INLINE vf convolve(const Conv *a, int64_t b, int64_t t, int64_t c, int lanes, const vf *taps, vf bias) {
    vf sum = bias;
    for (int64_t k = 0; k < a->width; k++) {
        int64_t s = source(a, t, k);
        if (s >= 0 && s < a->length) sum += taps[k] * load(a->x + b * a->x_b + s * a->x_l + c, lanes);
    }
    return sum;
}

void conv_forward(const Conv *a) {
    int64_t blocks = (a->channels + W - 1) / W;
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t item = 0; item < a->batch * blocks; item++) {
        int64_t b = item / blocks, c = item % blocks * W;
        int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
        vf taps[MAX_INNER], bias = load(a->bias + c, lanes);
        load_taps(a, c, lanes, taps);
        for (int64_t t = 0; t < a->length; t++) {
            vf y = convolve(a, b, t, c, lanes, taps, bias);
            store(a->y + (b * a->length + t) * a->channels + c, y * sigmoid_(y), lanes);
        }
    }
}

/* dweight (B, E, K) and dbias (B, E) are per sample; the caller adds them up. dx must be zero. */
void conv_backward(const Conv *a) {
    int64_t blocks = (a->channels + W - 1) / W;
#pragma omp parallel for num_threads(a->threads) schedule(static)
    for (int64_t item = 0; item < a->batch * blocks; item++) {
        int64_t b = item / blocks, c = item % blocks * W;
        int lanes = a->channels - c < W ? (int)(a->channels - c) : W;
        vf taps[MAX_INNER], dtaps[MAX_INNER], bias = load(a->bias + c, lanes), dbias = {0};
        load_taps(a, c, lanes, taps);
        for (int64_t k = 0; k < a->width; k++) dtaps[k] = (vf){0};
        for (int64_t t = 0; t < a->length; t++) {
            vf y = convolve(a, b, t, c, lanes, taps, bias), gate = sigmoid_(y);
            vf dy = load(a->grad + (b * a->length + t) * a->channels + c, lanes) * gate * (1.0f + y * (1.0f - gate));
            dbias += dy;
            for (int64_t k = 0; k < a->width; k++) {
                int64_t s = source(a, t, k);
                if (s < 0 || s >= a->length) continue;
                dtaps[k] += dy * load(a->x + b * a->x_b + s * a->x_l + c, lanes);
                float *dx = a->dx + (b * a->length + s) * a->channels + c;
                store(dx, load(dx, lanes) + dy * taps[k], lanes);
            }
        }
        for (int64_t k = 0; k < a->width; k++)
            for (int i = 0; i < lanes; i++) a->dweight[((b * a->channels) + c + i) * a->width + k] = dtaps[k][i];
        store(a->dbias + b * a->channels + c, dbias, lanes);
    }
}
