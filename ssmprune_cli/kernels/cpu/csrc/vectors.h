/* Vectors of W neighbouring channels, their loads and stores, and the functions that the kernels need.
 *
 * Portable GCC/Clang vector extensions; the caller compiles for the instruction set that it runs on. Loops over a few
 * vectors at a time (STAGE) do one step for all of them before the next: independent work side by side is what keeps the
 * arithmetic units busy. Do not compile with -ffast-math: rounding by adding MAGIC would be optimised away.
 */
#ifndef SSMPRUNE_VECTORS_H
#define SSMPRUNE_VECTORS_H
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
#ifdef __AVX512DQ__
#include <immintrin.h>
#endif
/* Declares a struct that call.py fills. What is in it goes into the library as text, for the check that both agree. */
#define ARGUMENTS(name, ...)             \
    typedef struct { __VA_ARGS__ } name; \
    static const char name##_text[] __attribute__((unused)) = #__VA_ARGS__
/* In one file for each of them. */
#define DESCRIBE(name)                                     \
    const char *name##_fields(void) { return name##_text; } \
    int64_t name##_size(void) { return sizeof(name); }

#define MAX_INNER 256 /* states or taps; the caller checks */
#define AHEAD 2      /* rows that are asked for before they are needed */
#define UNROLL 4     /* vectors in a STAGE; lengths of the arrays below are padded to a multiple of it */
#define INLINE static inline __attribute__((always_inline))
#define STAGE _Pragma("GCC unroll 8") for (int i = 0; i < UNROLL; i++)

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

static const float LOG2E = 1.44269504f;
static const float MAGIC = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer, in the lowest bits */

INLINE vf splat(float x) { return x - (vf){0}; }
INLINE vf pick(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
INLINE vf absolute(vf x) { return (vf)((vi)x & 0x7FFFFFFF); }

/* Element `at` and the next ones of float32 or, with `half`, bfloat16 data. */
INLINE vf load(const void *data, int64_t at, int lanes, int half) {
    if (half) {
        vh bits;
        if (lanes < W) bits = (vh){0}, memcpy(&bits, (const uint16_t *)data + at, (size_t)lanes * 2);
        else memcpy(&bits, (const uint16_t *)data + at, sizeof bits);
        return (vf)(__builtin_convertvector(bits, vu) << 16);
    }
    vf v;
    if (lanes < W) v = (vf){0}, memcpy(&v, (const float *)data + at, (size_t)lanes * 4);
    else memcpy(&v, (const float *)data + at, sizeof v);
    return v;
}

/* Ask for what will soon be loaded. Rows that are apart in memory are not foreseen by the processor. */
INLINE void fetch(const void *data, int64_t at, int half) { __builtin_prefetch((const char *)data + at * (half ? 2 : 4)); }

INLINE float load_one(const void *data, int64_t at, int half) {
    if (!half) return ((const float *)data)[at];
    union { uint32_t bits; float value; } one = {(uint32_t)((const uint16_t *)data)[at] << 16};
    return one.value;
}

/* bfloat16 is rounded to the nearest, ties to even; a NaN stays one. */
INLINE void store(void *data, int64_t at, vf v, int lanes, int half) {
    if (half) {
        vu bits = (vu)v, rounded = bits + 0x7FFF + ((bits >> 16) & 1);
        vi nan = v != v;
        vh high = __builtin_convertvector(((vu)nan & 0x7FC00000) >> 16 | (~(vu)nan & rounded) >> 16, vh);
        memcpy((uint16_t *)data + at, &high, lanes < W ? (size_t)lanes * 2 : sizeof high);
    } else {
        memcpy((float *)data + at, &v, lanes < W ? (size_t)lanes * 4 : sizeof v);
    }
}

#define SLAB (UNROLL * W) /* channels worked on at once */

/* Run `body` for vector i of the slab at channel c of `channels`; `lanes` is a constant where the slab is full, so that
 * loads and stores are single instructions. Both loops are unrolled: an array that is indexed by a variable anywhere would
 * stay in memory everywhere. */
#define FOR_SLAB(channels, c, body)                                                      \
    if ((channels) - (c) >= SLAB) {                                                      \
        STAGE { const int lanes = W; body; }                                             \
    } else {                                                                             \
        STAGE {                                                                          \
            int64_t left = (channels) - (c) - i * W;                                     \
            const int lanes = left < W ? (int)left : W;                                  \
            if (lanes > 0) { body; }                                                     \
        }                                                                                \
    }

INLINE float sum_lanes(vf v) {
    float total = 0;
    for (int i = 0; i < W; i++) total += v[i];
    return total;
}

/* p = 2^r for |r| <= 1/2: minimax of degree 5 (relative error 1.7e-7). A lower degree's bias adds up over slow decays. */
#define POLYNOMIAL(p, r)                                      \
    STAGE p[i] = 0.0013264727f * r[i] + 0.009671513f;         \
    STAGE p[i] = p[i] * r[i] + 0.055507336f;                  \
    STAGE p[i] = p[i] * r[i] + 0.24022243f;                   \
    STAGE p[i] = p[i] * r[i] + 0.693147f;                     \
    STAGE p[i] = p[i] * r[i] + 1.0f

#if W == 16 && defined(__AVX512DQ__)
/* Two instructions take the fraction of an exponent and apply its integer, whatever its size. */
#define BOUNDED 0

INLINE vf at_least(vf x, float low) { return (vf)_mm512_max_ps((__m512)splat(low), (__m512)x); }
INLINE vf at_most(vf x, float high) { return (vf)_mm512_min_ps((__m512)splat(high), (__m512)x); }

/* 1 / x for 0 < |x| < 2^126: an estimate of 14 bits, and a step of Newton's (relative error 6e-8). */
INLINE vf reciprocal(vf x) {
    vf r = (vf)_mm512_rcp14_ps((__m512)x);
    return r + r * (1.0f - x * r);
}

INLINE void exp2_of_any_products(const vf *a, vf b, vf *out) {
    vf x[UNROLL], r[UNROLL], p[UNROLL];
    STAGE x[i] = a[i] * b;
    STAGE r[i] = (vf)_mm512_reduce_ps((__m512)x[i], _MM_FROUND_TO_NEAREST_INT);
    POLYNOMIAL(p, r);
    STAGE x[i] -= r[i];
    STAGE out[i] = (vf)_mm512_scalef_ps((__m512)p[i], (__m512)x[i]);
}

INLINE void exp2_of_products(const vf *a, vf b, vf *out) { exp2_of_any_products(a, b, out); }
#else
#define BOUNDED 1 /* exp2_of_products cannot take every exponent */

/* A NaN stays one. */
INLINE vf at_least(vf x, float low) { return pick(x < low, splat(low), x); }
INLINE vf at_most(vf x, float high) { return pick(x > high, splat(high), x); }

INLINE vf reciprocal(vf x) { return 1.0f / x; }

/* 2^(a * b) for UNROLL vectors: the nearest integer by MAGIC, the polynomial on the rest, then the exponent's bits.
 * |a * b| must be below 126. */
INLINE void exp2_of_products(const vf *a, vf b, vf *out) {
    vf n[UNROLL], r[UNROLL], p[UNROLL];
    STAGE n[i] = a[i] * b + MAGIC;
    STAGE p[i] = n[i] - MAGIC;
    STAGE r[i] = a[i] * b - p[i];
    POLYNOMIAL(p, r);
    STAGE out[i] = (vf)((vi)p[i] + ((vi)n[i] << 23));
}

/* The same for any product: below 2^-126 it gives 2^-126, above 2^126 2^126; NaN stays NaN. */
INLINE void exp2_of_any_products(const vf *a, vf b, vf *out) {
    vf x[UNROLL], safe[UNROLL];
    STAGE x[i] = a[i] * b;
    STAGE safe[i] = at_most(at_least(x[i], -126.0f), 126.0f);
    exp2_of_products(safe, splat(1.0f), safe);
    STAGE out[i] = pick(x[i] == x[i], safe[i], x[i]);
}
#endif

/* x becomes 1 / (1 + exp(-x)), or 0 where that is less than 2^-125. */
INLINE void sigmoid(vf *x) {
    vi tiny[UNROLL];
    STAGE tiny[i] = x[i] < -87.0f;
    STAGE x[i] = at_least(x[i], -87.0f);
    exp2_of_any_products(x, splat(-LOG2E), x);
    STAGE x[i] = (vf)(~tiny[i] & (vi)reciprocal(1.0f + x[i]));
}

/* x becomes max(x, 0) + log1p(exp(-|x|)). The logarithm is 2 atanh(s) with s = w / (2 + w), at most 1/3: no cancellation
 * for small w, and an odd polynomial of degree 9 is enough (relative error 6e-9). */
INLINE void softplus(vf *x) {
    vf w[UNROLL], s[UNROLL], q[UNROLL];
    STAGE w[i] = absolute(x[i]);
    exp2_of_any_products(w, splat(-LOG2E), w);
    STAGE s[i] = w[i] * reciprocal(w[i] + 2.0f);
    STAGE q[i] = s[i] * s[i];
    STAGE w[i] = 0.280118972f * q[i] + 0.28001821f;
    STAGE w[i] = w[i] * q[i] + 0.400215268f;
    STAGE w[i] = w[i] * q[i] + 0.666664183f;
    STAGE w[i] = w[i] * q[i] + 2.0f;
    STAGE x[i] = at_least(x[i], 0.0f) + s[i] * w[i];
}
#endif
