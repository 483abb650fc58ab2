/* Vectors of floats in one register, and what depends on the instruction set: AVX-512, AVX2, or whatever the compiler
 * makes of the plain code. GCC's and Clang's vector extensions do the arithmetic. */
#ifndef BILD_VECTORS_H
#define BILD_VECTORS_H

#include <math.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

/* ---- Sizes ------------------------------------------------------------------------------------------------------- */

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 12        /* rows that share a weight in registers */
#define PAIRED_ROWS 5  /* with this many rows or fewer, the sums of two panels fit in registers */
#define MOST_PANELS 8  /* with one row, the sums of so many panels */
#elif defined(__AVX2__)
#define LANES 8
#define ROWS 6
#define PAIRED_ROWS 2
#define MOST_PANELS 4
#else
#define LANES 4
#define ROWS 6
#define PAIRED_ROWS 2
#define MOST_PANELS 4
#endif
#if defined(__AVX512VNNI__) || (defined(__AVXVNNI__) && !defined(__AVX512F__))
#define UNSIGNED_BY_SIGNED /* an instruction multiplies unsigned bytes by signed ones */
#endif
#define PANEL (2 * LANES) /* outputs that are computed together */

typedef float vec __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef int32_t ivec __attribute__((vector_size(LANES * 4)));
typedef uint32_t uvec __attribute__((vector_size(LANES * 4)));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));
typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));

/* ---- Weights ----------------------------------------------------------------------------------------------------- */

enum { FLOAT32, FLOAT16, BFLOAT16, INT8 };

static inline int64_t weight_size(int64_t type) { return type == FLOAT32 ? 4 : type == INT8 ? 1 : 2; }

/* LANES unsigned integers of two bytes; compilers make more than one instruction of the last line. */
static inline __attribute__((always_inline)) uvec widen(const uint16_t *from) {
#if defined(__AVX512F__)
    return (uvec)_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i_u *)from));
#elif defined(__AVX2__)
    return (uvec)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i_u *)from));
#else
    return __builtin_convertvector(*(const halves *)from, uvec);
#endif
}

/* LANES weights, from the given one on, as floats; not for INT8. */
static inline __attribute__((always_inline)) vec load(int type, const void *weight, int64_t offset) {
    if (type == FLOAT32) return *(const vec *)((const float *)weight + offset);
    const uint16_t *w = (const uint16_t *)weight + offset;
    if (type == BFLOAT16) return (vec)(widen(w) << 16);
#if defined(__AVX512F__)
    return (vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i_u *)w));
#elif defined(__AVX2__) && defined(__F16C__)
    return (vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i_u *)w));
#else /* a finite half's exponent and mantissa, shifted to a float's, are 2^-112 times its value */
    uvec h = widen(w);
    vec size = (vec)((h & 0x7fff) << 13) * 0x1p112f;
    return (vec)((uvec)size | (h & 0x8000) << 16);
#endif
}

/* ---- Arithmetic -------------------------------------------------------------------------------------------------- */

static inline vec broadcast(float x) { return x - (vec){0}; }

static inline vec choose(ivec mask, vec yes, vec no) { return (vec)((mask & (ivec)yes) | (~mask & (ivec)no)); }

/* The next n floats, fewer than LANES, or 0 beyond them. */
static inline vec load_part(const float *x, int64_t n) {
    vec v = {0};
    if (n > 0) memcpy(&v, x, n * sizeof(float));
    return v;
}

/* Integers within 127 as one byte each. */
static inline void store_bytes(int8_t *to, ivec v) {
#if defined(__AVX512F__)
    _mm_storeu_si128((__m128i_u *)to, _mm512_cvtepi32_epi8((__m512i)v));
#else
    *(bytes *)to = __builtin_convertvector(v, bytes);
#endif
}

/* The next n floats, or -inf beyond them. */
static inline vec load_some(const float *x, int64_t n) {
    if (n >= LANES) return *(const vec *)x;
    vec v = broadcast(-INFINITY);
    memcpy(&v, x, n * sizeof(float));
    return v;
}

static inline void store_some(float *x, vec v, int64_t n) { memcpy(x, &v, (n < LANES ? n : LANES) * sizeof(float)); }

static inline float vec_max(vec v) {
    float max = v[0];
    for (int i = 1; i < LANES; i++) max = v[i] > max ? v[i] : max;
    return max;
}

static inline float vec_sum(vec v) {
    float sum = v[0];
    for (int i = 1; i < LANES; i++) sum += v[i];
    return sum;
}

static inline vec vec_exp(vec x) {
    vec low = broadcast(-87.0f), high = broadcast(88.0f); /* comparisons with NaN are false: it stays NaN */
    x = choose(x < low, low, x);
    x = choose(x > high, high, x);
    vec shifted = x * 1.44269504f + 12582912.0f; /* rounds to the nearest integer, kept in the low bits */
    vec n = shifted - 12582912.0f;
    vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    vec p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return p * (vec)(((ivec)shifted + 127) << 23); /* the shift drops the bits that 12582912 has set above */
}

/* x * P(X <= x) for a standard normal X, with erf by Abramowitz and Stegun 7.1.26 (error below 1.5e-7). */
static inline vec gelu(vec x) {
    vec z = choose(x < 0, -x, x) * 0.70710678f;
    vec t = 1.0f / (1.0f + 0.3275911f * z);
    vec p = broadcast(1.061405429f);
    p = p * t - 1.453152027f;
    p = p * t + 1.421413741f;
    p = p * t - 0.284496736f;
    p = p * t + 0.254829592f;
    vec erf = 1.0f - p * t * vec_exp(-z * z);
    return 0.5f * x * (1.0f + choose(x < 0, -erf, erf));
}

/* The same with tanh instead of erf: x / (1 + exp(-2 z)) is x * (1 + tanh(z)) / 2. */
static inline vec gelu_tanh(vec x) {
    vec z = 0.79788456f * (x + 0.044715f * x * x * x);
    return x / (1.0f + vec_exp(-2.0f * z));
}

enum { NONE, RELU, GELU, GELU_TANH };

static inline vec activate(int64_t activation, vec x) {
    if (activation == RELU) return choose(x < 0, (vec){0}, x);
    if (activation == GELU) return gelu(x);
    if (activation == GELU_TANH) return gelu_tanh(x);
    return x;
}

#endif
